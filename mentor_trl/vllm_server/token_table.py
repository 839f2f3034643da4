"""What a policy's engine knows of its tokens, computed alike by servers and their clients."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import SetupError
from ..objective import sentence_endings


@dataclass(frozen=True)
class TokenTable:
    """
    Args:
        num_tokens (`int`):
            Number of ids that the tokenizer defines; those from there on are padding, which is never sampled.
        branch_id (`int`):
            Id that ends a request at a branch point, see [`branch_id`]. It is never sampled otherwise.
        sentence_ids (`tuple[int, ...]`, *optional*):
            Ids behind which a sentence may begin, ascending, see [`~mentor_trl.objective.sentence_endings`].
    """

    num_tokens: int
    branch_id: int
    sentence_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> "TokenTable":
        """
        The table of a tokenizer.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the policy.
            vocab_size (`int`):
                Size of the model's vocabulary.
            stop_ids (`Iterable[int]`, *optional*):
                Ids that end completions, beside the tokenizer's own.

        Raises:
            [`SetupError`]: if the model has no row for an id of the tokenizer, or none left for a branch id.
        """
        num_tokens = max(tokenizer.get_vocab().values()) + 1
        stops = {tokenizer.eos_token_id, *stop_ids}
        return cls(
            num_tokens,
            branch_id(num_tokens, vocab_size, special_ids(tokenizer), stops),
            tuple(sentence_endings(tokenizer)),
        )

    @property
    def digest(self) -> str:
        """Of the table of sentences, by which a server and its clients find that they have the same one."""
        return hashlib.sha256(",".join(map(str, self.sentence_ids)).encode()).hexdigest()[:16]


def special_ids(tokenizer) -> list[int]:
    """Ids of a tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)})


def branch_id(num_tokens: int, vocab_size: int, special: Iterable[int] = (), stop_ids: Iterable[int] = ()) -> int:
    """
    The id that ends a request at a branch point: the last row of the vocabulary where it is padding, else the last
    special token that does not end completions.

    Args:
        num_tokens (`int`):
            Number of ids that the tokenizer defines.
        vocab_size (`int`):
            Size of the model's vocabulary.
        special (`Iterable[int]`, *optional*):
            Ids of special tokens.
        stop_ids (`Iterable[int]`, *optional*):
            Ids that end completions, of any kind.

    Returns:
        `int`.

    Raises:
        [`SetupError`]: if the model has no row for an id of the tokenizer, or none left for a branch id.

    Example:
    ```python
    >>> branch_id(100, 128), branch_id(128, 128, special=[0, 126, 127], stop_ids=[127])
    (127, 126)
    ```
    """
    if num_tokens > vocab_size:
        raise SetupError(
            f"The tokenizer defines {num_tokens} ids, and the policy has rows for {vocab_size}. Call "
            f"`resize_token_embeddings({num_tokens + 1})` on the policy and save it."
        )
    if num_tokens < vocab_size:
        return vocab_size - 1
    free = set(special) - set(stop_ids)
    if not free:
        raise SetupError(
            f"All {vocab_size} rows of the policy's vocabulary are tokens that may be sampled, and none is left to "
            f"end a request at a branch point. Call `resize_token_embeddings({vocab_size + 1})` on the policy and "
            "save it."
        )
    return max(free)


def engine_stop_ids(config) -> list[int]:
    """Ids with which a model ends a completion, by vLLM's configuration of it."""
    generation = config.try_get_generation_config()
    found = []
    for value in (generation.get("eos_token_id"), getattr(config.hf_text_config, "eos_token_id", None)):
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [index for index in values if index is not None and index not in found]
    return found
