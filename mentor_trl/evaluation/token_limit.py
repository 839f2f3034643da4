"""How many tokens a completion may have, and which completions were cut off there."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from lm_eval.api.model import LM


MAX_NEW_TOKENS = 8192
"""The paper's limit: the most that is chosen where a model has room for more."""


class Completion(str):
    """The text of a completion that knows whether it was cut off at the limit of tokens."""

    cut: bool

    def __new__(cls, text: str, cut: bool = False) -> "Completion":
        self = super().__new__(cls, text)
        self.cut = cut
        return self


class TokenLimit:
    """
    The limit of new tokens of a set, which is known once lm-eval has built the prompts.

    Args:
        wanted (`int`, *optional*):
            The limit that is asked for. Without one it is what the longest prompt leaves of the model's positions, at
            most `MAX_NEW_TOKENS`.
    """

    def __init__(self, wanted: int | None = None):
        self.wanted, self.value = wanted, wanted or MAX_NEW_TOKENS
        self.longest: int | None = None
        self.positions: int | None = None

    @property
    def room(self) -> int | None:
        """The most new tokens that fit; `None` where a server does not say."""
        return None if self.longest is None else self.positions - self.longest

    def fit(self, longest: int, positions: int) -> None:
        """Choose the limit, given the longest prompt and the positions of the model; nothing is ever cut to fit."""
        self.longest, self.positions = longest, positions
        if self.room < 1:
            raise SetupError(
                f"The longest prompt has {longest} tokens, which leaves no room for a completion in the model's "
                f"{positions} positions; evaluate a model with a longer context"
            )
        if self.wanted and self.wanted > self.room:
            raise SetupError(
                f"The longest prompt has {longest} tokens, which with `max_new_tokens` {self.wanted} exceeds the "
                f"model's {positions} positions; set `max_new_tokens` to {self.room} or less, or leave it out"
            )
        self.value = self.wanted or min(MAX_NEW_TOKENS, self.room)

    def __str__(self) -> str:
        chosen = f"at most {self.value:,} new tokens a completion"
        if self.wanted:
            return f"{chosen}, as `max_new_tokens` says"
        if self.room is None:
            return f"{chosen}; the server does not say whether they fit"
        if self.value == self.room:
            return f"{chosen}; the longest prompt takes {self.longest:,} of the model's {self.positions:,} positions"
        return f"{chosen}, as in the paper"


@contextmanager
def limited(lm: "LM", wanted: int | None = None) -> Iterator[TokenLimit]:
    """
    Let a model of lm-eval generate under a limit of new tokens that fits it, and return [`Completion`]s. The local
    back-ends would cut a prompt from the left to make room.
    """
    limit, generate = TokenLimit(wanted), lm.generate_until

    def generate_until(requests: list, **kwargs: Any) -> list[Completion]:
        measured = _measure(lm, requests)
        if measured:
            limit.fit(*measured)
        for request in requests:
            prompt, options = request.arguments
            request.arguments = (prompt, {**options, "max_gen_toks": limit.value})
        if _of_server(lm):
            return generate(requests, **kwargs)
        with _watched(lm) as cuts:
            texts = generate(requests, **kwargs)
        return [Completion(text, cuts[request.args[0], text].pop()) for request, text in zip(requests, texts)]

    lm.generate_until = generate_until
    try:
        yield limit
    finally:
        vars(lm).pop("generate_until", None)


def _of_server(lm: "LM") -> bool:
    return getattr(lm, "base_url", None) is not None


def _measure(lm: "LM", requests: list) -> tuple[int, int] | None:
    """Tokens of the longest prompt, on all processes together, and positions of the model."""
    prompts = list(dict.fromkeys(request.args[0] for request in requests))
    if _of_server(lm):
        return lm.measure(prompts)
    longest = max(len(lm.tok_encode(prompt)) for prompt in prompts)
    if lm.world_size > 1:
        longest = int(lm.all_gather(torch.tensor([longest], device=lm.device)).max())
    return longest, lm.max_length


@contextmanager
def _watched(lm: "LM") -> Iterator[dict[tuple[str, str], list[bool]]]:
    """
    Note for each prompt and text whether it was cut off. lm-eval hands only texts on, and sorts what it generates; its
    cache hook, which gets prompt and text in the order of generation, tells which text belongs to which flag.
    """
    cuts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    generate, hook, waiting = lm._model_generate, lm.cache_hook, []

    def model_generate(*args: Any, **kwargs: Any) -> Any:
        generated = generate(*args, **kwargs)
        waiting[:] = _cut_rows(lm, generated, kwargs)
        return generated

    class Hook:
        def add_partial(self, name: str, request: Any, text: str) -> None:
            cuts[request[0], text].append(waiting.pop(0))
            hook.add_partial(name, request, text)

    lm._model_generate, lm.cache_hook = model_generate, Hook()
    try:
        yield cuts
    finally:
        vars(lm).pop("_model_generate", None)
        lm.cache_hook = hook


def _cut_rows(lm: "LM", generated: Any, options: dict[str, Any]) -> list[bool]:
    """For each row of a batch, whether it reached the limit: vLLM says so, transformers' rows then hold no end."""
    if not isinstance(generated, torch.Tensor):
        return [output.outputs[0].finish_reason == "length" for output in generated]
    new = generated[:, options["context"].shape[1] :]
    if generated.shape[1] < options["max_length"]:
        return [False] * len(new)
    ends = lm.model.generation_config.eos_token_id
    ends = {lm.eot_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return (~torch.isin(new, torch.tensor(sorted(ends), device=new.device)).any(dim=1)).tolist()
