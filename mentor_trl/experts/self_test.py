"""What a stock vLLM server must prove before it may speak as the expert."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..connection.background import gathered
from ..connection.client import Client
from ..connection.contents import reading
from ..connection.failures import KeyRefused, ServerError, WrongServer
from .completions import PATH, completion_body, drawn, only_choice, prompt_logps, top_logps


COLD = 0.5
PROBES, TOP = 8, 5
FINGERPRINT_LENGTH = 32
BATCH = 256  # ids whose strings are asked for at once
AT_ONCE = 32
# In nats, on average: what 16-bit arithmetic may change between two requests
NOISE = 0.05
START = "Start the expert with `vllm serve MODEL --logprobs-mode processed_logprobs`"
ADVICE = "Serve the expert that the run began with, with the options that it had"


@dataclass(frozen=True)
class Facts:
    """What a server has shown of itself."""

    name: str
    root: str
    max_model_len: int
    stop_token_ids: tuple[int, ...]
    fingerprint: tuple[float, ...]  # log-probabilities of a fixed prompt

    def check_same(self, other: "Facts", url: str, what: str) -> None:
        """Raise [`WrongServer`] if another server, or the same one after a restart, is not this one."""
        for field, called in (("name", "name"), ("root", "model"), ("max_model_len", "context")):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs and not (field == "max_model_len" and theirs > ours):
                raise WrongServer(f"{url} {what}: the {called} was {ours!r} and is {theirs!r}. {ADVICE}.")
        if self.stop_token_ids != other.stop_token_ids:
            raise WrongServer(
                f"{url} {what}: {self.name!r} ended at the ids {list(self.stop_token_ids)} and {other.name!r} ends at "
                f"{list(other.stop_token_ids)}. {ADVICE}."
            )
        if mean_difference(self.fingerprint, other.fingerprint) > NOISE:
            raise WrongServer(
                f"{url} {what}: both are called {self.name!r} ({self.root!r}), and a fixed prompt had the "
                f"log-probabilities {_shown(self.fingerprint)} and has {_shown(other.fingerprint)}. {ADVICE}."
            )


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in values[:4]) + ", ...]"


class SelfTest:
    """
    Questions to a server that is to be the expert.

    Args:
        client ([`~mentor_trl.connection.client.Client`]):
            Client of the server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        served_name (`str`, *optional*):
            Name under which the expert is served; needed where the server has several models.
        needs_tempered (`bool`, *optional*, defaults to `True`):
            Whether log-probabilities at other temperatures than 1 are needed.
    """

    def __init__(
        self,
        client: Client,
        tokenizer: PreTrainedTokenizerBase,
        served_name: str | None = None,
        needs_tempered: bool = True,
    ):
        self.client, self.served_name, self.needs_tempered = client, served_name, needs_tempered
        self.tokenizer = tokenizer
        self.known = sorted(tokenizer.get_vocab().values())
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.candidates = sorted(special | set(tokenizer.all_special_ids))

    async def run(self) -> Facts:
        """
        The whole test.

        Raises:
            [`WrongServer`]: naming what the server does not do, and the fix.
            `httpx.TransportError` or [`Failed`]: if it does not answer.
        """
        name, root, length = await self._model()
        await self._check_strings(name)
        return await self._facts(name, root, length, tuple(await self._stops(name)))

    async def run_again(self, before: Facts) -> Facts:
        """The part of the test that tells whether a server that was not seen for a while is what it was."""
        return await self._facts(*await self._model(), before.stop_token_ids)

    async def _facts(self, name: str, root: str, length: int, stops: tuple[int, ...]) -> Facts:
        await self._check_settings(name)
        return Facts(name, root, length, stops, await self._fingerprint(name, length))

    async def _complete(self, name: str, prompt: Sequence[int], count: int = 1, **settings: Any) -> Any:
        return await self.client.ask(PATH, json=completion_body(name, prompt, count, **settings))

    def _reading(self, path: str = PATH):
        return reading(self.client.url, path, WrongServer)

    # Who answers

    async def _model(self) -> tuple[str, str, int]:
        try:
            answer = await self.client.ask("/v1/models", "GET")
        except KeyRefused:
            raise
        except ServerError as error:
            raise WrongServer(f"{self.client.url} is not a vLLM server ({error}). {START}.") from error
        with self._reading("/v1/models"):
            models = {model["id"]: model for model in answer["data"]}
            bases = [name for name, model in models.items() if not model.get("parent")]
            name = self.served_name or bases[0]
            if name not in models:
                raise WrongServer(
                    f"{self.client.url} serves {', '.join(map(repr, models))} and not {name!r}. Set "
                    "`expert_served_model_name` to one of them, or serve that expert."
                )
            found = models[name]
            length = found.get("max_model_len") or models[bases[0]]["max_model_len"]
            if type(length) is not int:
                raise ValueError(f"a context of {length!r}")
            return name, str(found.get("root")), length

    async def _fingerprint(self, name: str, length: int) -> tuple[float, ...]:
        prompt = self._spread(min(FINGERPRINT_LENGTH, length - 1))
        answer = await self._complete(name, prompt, prompt_logprobs=0)
        with self._reading():
            return tuple(prompt_logps(answer, prompt))

    def _spread(self, count: int, shift: int = 0) -> list[int]:
        return [self.known[(shift + 7919 * at) % len(self.known)] for at in range(count)]

    # Its tokens

    async def _check_strings(self, name: str) -> None:
        batches = [self.known[at : at + BATCH] for at in range(0, len(self.known), BATCH)]

        async def differ(ids: list[int]) -> bool:
            answer = await self.client.ask("/detokenize", json={"model": name, "tokens": ids})
            with self._reading("/detokenize"):
                return answer["prompt"] != self.tokenizer.decode(ids)

        try:
            suspects = [ids for ids, wrong in zip(batches, await gathered(differ, batches, AT_ONCE)) if wrong]
            for ids in suspects[:4]:  # strings may differ where tokens meet
                wrong = await gathered(differ, [[index] for index in ids], AT_ONCE)
                different = [index for index, one in zip(ids, wrong) if one]
                if different:
                    shown = ", ".join(f"{index} ({self.tokenizer.decode([index])!r})" for index in different[:5])
                    raise ValueError(f"other tokens than the policy's at {len(different)} ids, among them {shown}")
        except (ServerError, ValueError) as error:
            if isinstance(error, KeyRefused):
                raise
            raise WrongServer(
                f"The tokens of {self.client.url} ({name!r}) are not the policy's: {error}. Mixed rollouts need the "
                "same tokens: serve an expert of the policy's family, with its tokenizer."
            ) from error

    async def _stops(self, name: str) -> list[int]:
        async def ends(index: int) -> bool:
            answer = await self._complete(name, self._spread(1), 2, allowed_token_ids=[index], ignore_eos=False)
            with self._reading():
                choice = only_choice(answer)
                return choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == 1

        found = await gathered(ends, self.candidates, AT_ONCE)
        return [index for index, stop in zip(self.candidates, found) if stop]

    # Its log-probabilities

    async def _check_settings(self, name: str) -> None:
        probes = await gathered(lambda shift: self._probe(name, shift), range(PROBES), AT_ONCE)
        if self.needs_tempered:
            self._check_mode(name, [(warm, cold) for warm, cold, _ in probes])
        difference = sum(wrong for _, _, wrong in probes) / PROBES
        if difference > 2 * NOISE:
            raise WrongServer(
                f"{self.client.url} ({name!r}) draws tokens by other probabilities than its model's: they differ by "
                f"{difference:.3f} nats on average although a request sets temperature 1, no truncation and no "
                "penalties. Start it without logits processors, with `--generation-config vllm`."
            )

    async def _probe(self, name: str, shift: int) -> tuple[dict[int, float], dict[int, float], float]:
        """The largest log-probabilities at two temperatures, and by how much a drawn token's is off the model's."""
        prompt = self._spread(1 + shift, shift)
        warm = await self._complete(name, prompt, logprobs=TOP, seed=shift)
        with self._reading():
            (index,), (logp,) = drawn(warm, 1, ())
            found = top_logps(warm)
        scored = await self._complete(name, [*prompt, index], prompt_logprobs=0)
        cold = await self._complete(name, prompt, logprobs=TOP, temperature=COLD) if self.needs_tempered else warm
        with self._reading():
            return found, top_logps(cold), abs(logp - prompt_logps(scored, [*prompt, index])[-1])

    def _check_mode(self, name: str, probes: list[tuple[dict[int, float], dict[int, float]]]) -> None:
        """Whether log-probabilities at a temperature T are those of softmax(logits / T)."""
        tempered = raw = count = 0.0
        for warm, cold in probes:
            ids = sorted(warm.keys() & cold.keys())
            due = {index: warm[index] / COLD for index in ids}
            # Between the largest alone and all of the rest as likely as the least of them
            least, rest = min(warm.values()), max(0.0, 1.0 - sum(map(math.exp, warm.values())))
            largest = sum(math.exp(logp / COLD) for logp in warm.values())
            bounds = math.log(largest), math.log(largest + rest * math.exp(least * (1.0 / COLD - 1.0)))
            for index in ids:
                shift = due[index] - cold[index]
                tempered += max(bounds[0] - shift, shift - bounds[1], 0.0)
                raw += abs(warm[index] - cold[index])
                count += 1.0
        same = tempered > raw and tempered > 1e-3 * count
        if not count or same or tempered > 2 * NOISE * count:
            why = "are the same at every temperature" if same else "do not follow the temperature"
            raise WrongServer(
                f"The log-probabilities of {self.client.url} ({name!r}) {why}, and those of tempered tokens are "
                "needed. Start the server with `--logprobs-mode processed_logprobs`."
            )
