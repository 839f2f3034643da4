"""An expert on stock vLLM servers of its own."""

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..connection import background
from ..connection.addresses import addresses
from ..connection.client import Client, Patience
from ..connection.failures import WrongServer
from ..objective.coins import request_seed
from ..vllm_server.keys import checked_key, key_of, read_key
from .completions import Truncated, completion_body, drawn, prompt_logps, top_logps, truncation_settings
from .expert_server import ExpertServer
from .port import Points, Spoken
from .self_test import SelfTest


KEY, KEY_FILE = "MENTOR_TRL_EXPERT_API_KEY", "MENTOR_TRL_EXPERT_API_KEY_FILE"
KEY_ADVICE = f"Name the file with the expert's key in `expert_api_key_file`, or set {KEY} to the key."
UNKNOWN_MASS = 1e-3
AT_ONCE = 256


def expert_key(url: str, file: str | None = None) -> str | None:
    """
    The key of an expert's server, if there is one: from the file, from `MENTOR_TRL_EXPERT_API_KEY` or
    `MENTOR_TRL_EXPERT_API_KEY_FILE`, or where that of a policy's server would be.
    """
    if file is None and os.environ.get(KEY):
        return checked_key(os.environ[KEY], KEY)
    if file is None and os.environ.get(KEY_FILE):
        return read_key(os.environ[KEY_FILE])
    return key_of(url, file)


class RemoteExpert:
    """
    A frozen expert that stock vLLM servers hold, one or several with the same model. It draws tokens from s by itself
    (it does not couple them with the policy's), and every row stays with one server.

    Args:
        urls (`str` or `list[str]`):
            Addresses, as `http://127.0.0.1:8001`; several in one text are separated by commas.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        served_name (`str`, *optional*):
            Name under which the expert is served; by default that of the server's own model.
        api_key_file (`str`, *optional*):
            File with the servers' key. If not given, see [`expert_key`].
        patience ([`~mentor_trl.connection.client.Patience`], *optional*):
            Time-outs and retries.
        needs_tempered (`bool`, *optional*, defaults to `True`):
            Whether log-probabilities of tempered or truncated tokens are needed, which a server gives only with
            `--logprobs-mode processed_logprobs`. Without it, what is known is log s at temperature 1.

    Attributes:
        name (`str`):
            Id or folder of the model, as the server names it.
        max_length (`int`):
            Context in tokens, the shortest of all servers'.
        stop_token_ids (`list[int]`):
            Ids among the policy's special tokens with which the expert ends a completion.
        redraws (`int`):
            Tokens that were drawn again because the policy's tokenizer does not define them.

    Raises:
        [`SetupError`]: if an address is none, or the key cannot be read.
        [`ServerError`]: if a server does not answer in time; [`WrongServer`], if it is not fit to be the expert.

    Example:
    ```python
    expert = RemoteExpert("http://gpu1:8001, http://gpu2:8001", tokenizer)
    ```
    """

    couples = False

    def __init__(
        self,
        urls: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        served_name: str | None = None,
        api_key_file: str | None = None,
        patience: Patience | None = None,
        needs_tempered: bool = True,
    ):
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        self.clients = [
            Client(url, patience, partial(expert_key, url, api_key_file), KEY_ADVICE) for url in addresses(urls)
        ]
        tests = [SelfTest(client, tokenizer, served_name, needs_tempered) for client in self.clients]
        self.servers = [ExpertServer(client, test) for client, test in zip(self.clients, tests)]
        self.draws = self.redraws = 0
        facts = background.run(background.gathered(lambda server: server.prove(), self.servers, len(self.servers)))
        for client, other in zip(self.clients[1:], facts[1:]):
            facts[0].check_same(other, client.url, f"is not like {self.clients[0].url}")
        self.served_name, self.name = facts[0].name, facts[0].root
        self.max_length = min(found.max_model_len for found in facts)
        self.stop_token_ids = list(facts[0].stop_token_ids)

    @property
    def max_model_len(self) -> int:
        """Context in tokens."""
        return self.max_length

    @property
    def traffic(self) -> dict[str, int]:
        """Requests so far, and the bytes sent and received, of all servers."""
        return {
            name: sum(getattr(client, name) for client in self.clients) for name in ("requests", "sent", "received")
        }

    # Tokens drawn from s

    async def speak(
        self,
        prefix_ids: Sequence[int],
        count: int,
        temperature: float,
        stop_token_ids: Sequence[int],
        row_seed: int,
        truncation: Truncated | None = None,
    ) -> tuple[list[int], list[float]]:
        """
        Draw tokens from s behind a prefix.

        Args:
            prefix_ids (`list[int]`):
                Ids of the row so far.
            count (`int`):
                How many tokens to draw, at most.
            temperature (`float`):
                Divides the logits.
            stop_token_ids (`list[int]`):
                Ids behind which no token is drawn.
            row_seed (`int`):
                Seed of the row, by which its server is chosen, too.
            truncation (*optional*):
                `top_p`, `top_k` and `min_p`; nothing is cut off if not given.

        Returns:
            The ids, with the stop id if there was one, and their log s in nats.

        Raises:
            [`ServerError`]: if the server fails in spite of all patience, or [`WrongServer`], if it is not the one
                that was tested, or gives weight to ids that the policy's tokenizer does not define.
        """
        settings = {"temperature": temperature, "stop_token_ids": list(stop_token_ids)}
        settings |= truncation_settings(truncation)
        return await background.awaited(self._speak(list(prefix_ids), count, row_seed, settings))

    async def _speak(
        self, prefix: list[int], count: int, row_seed: int, settings: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        server, ids, logps, attempt = self._server(row_seed), [], [], 0
        stops = settings["stop_token_ids"]
        while len(ids) < count and not (ids and ids[-1] in stops):
            left, seed = count - len(ids), request_seed(row_seed, len(prefix) + len(ids), "expert", attempt)
            body = completion_body(self.served_name, prefix + ids, left, seed=seed, **settings)
            new, values = await server.complete(body, partial(drawn, count=left, stop_token_ids=stops))
            known = next((at for at, index in enumerate(new) if index >= self.num_tokens), len(new))
            self.draws += min(known + 1, len(new))
            if known < len(new):
                self._redraw(server, new[known], values[known])
            attempt = 0 if known else attempt + 1
            ids, logps = ids + new[:known], logps + values[:known]
        return ids, logps

    def _redraw(self, server: ExpertServer, index: int, logp: float) -> None:
        """Count a token that the policy does not have; refuse an expert that gives such tokens much weight."""
        self.redraws += 1
        due = UNKNOWN_MASS * self.draws
        if math.exp(logp) > UNKNOWN_MASS or self.redraws > due + 5.0 * math.sqrt(due) + 3.0:
            raise WrongServer(
                f"{server.client.url} ({self.served_name!r}) drew the id {index} with the probability "
                f"{math.exp(logp):.2g}, and the policy's tokenizer defines {self.num_tokens} ids; {self.redraws} of "
                f"{self.draws} tokens were such. Serve an expert whose padding ids have no weight, as one that was "
                "trained with this tokenizer."
            )

    def _server(self, row_seed: int) -> ExpertServer:
        return self.servers[row_seed % len(self.servers)]

    # The port of an expert

    def consult(self, points: Points) -> Spoken:
        """
        Draw the tokens at branch points from s, and score the drafts elsewhere, by one request a point; see
        [`~mentor_trl.experts.port.Expert.consult`].
        """

        async def one(point: int) -> tuple[int, float]:
            prefix, draft = points.prefix(point), int(points.draft[point])
            seed = points.row_seeds[int(points.row[point])]
            settings = {"temperature": points.temperature, "stop_token_ids": []}
            if not points.branch[point]:
                return draft, await self._logp(self._server(seed), prefix, draft, points.temperature)
            (index,), (logp,) = await self._speak(prefix, 1, seed, settings)
            return index, logp

        found = background.run(background.gathered(one, range(len(points.row)), AT_ONCE))
        tokens = torch.tensor([index for index, _ in found], dtype=torch.long, device=points.draft.device)
        logps = torch.tensor([logp for _, logp in found], device=points.draft.device)
        return Spoken(tokens, None, logps, None)

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> torch.Tensor:
        """
        log s of every token of given completions, `(rows, longest completion)` in nats, NaN behind their ends. One
        request a row at temperature 1, and one a token elsewhere, since a server scores prompts at 1 only.
        """
        rows = list(enumerate(zip(prompt_ids, completion_ids)))

        async def scored(row: tuple[int, tuple[Sequence[int], Sequence[int]]]) -> list[float]:
            number, (prompt, completion) = row
            return await self._score(self._server(number), list(prompt), list(completion), temperature)

        values = torch.full((len(rows), max(map(len, completion_ids), default=0)), math.nan)
        for row, logps in enumerate(background.run(background.gathered(scored, rows, AT_ONCE))):
            values[row, : len(logps)] = torch.tensor(logps)
        return values

    async def _score(
        self, server: ExpertServer, prompt: list[int], completion: list[int], temperature: float
    ) -> list[float]:
        ids, first = prompt + completion, len(prompt)
        # A request for log-probabilities of its prompt draws a token, too, for which a full context has no room
        read = min(len(ids), self.max_length - 1) if temperature == 1.0 else first
        logps = []
        if read > first:
            body = completion_body(self.served_name, ids[:read], 1, prompt_logprobs=0)
            logps = (await server.complete(body, partial(prompt_logps, prompt=ids[:read])))[first - 1 :]
        for at in range(read, len(ids)):
            logps.append(await self._logp(server, ids[:at], ids[at], temperature))
        return logps

    async def _logp(self, server: ExpertServer, prefix: list[int], index: int, temperature: float) -> float:
        body = completion_body(self.served_name, prefix, 1, temperature=temperature, logprob_token_ids=[index])
        return await server.complete(body, lambda answer: top_logps(answer)[index])
