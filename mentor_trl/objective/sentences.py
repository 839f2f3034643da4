"""Where sentences end, by the ids of a tokenizer: what the branch rule `"sentence"` listens to."""

import re

import torch


# A full stop or its like, what may close behind it, and space; or a line break, wherever it is
_ENDING = re.compile(r"[.!?…。！？][\"'”’»)\]}*_]*\s*$|\n")


def sentence_endings(tokenizer) -> list[int]:
    """
    Ids of a tokenizer behind which a sentence may begin, ascending: tokens that end in `.`, `!`, `?` or their like,
    also with quotes or brackets behind it, and tokens with a line break. The dot of a number counts as well; special
    tokens do not.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.

    Returns:
        `list[int]`.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(index for index in tokenizer.get_vocab().values() if index not in special)
    texts = tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
    return [index for index, text in zip(ids, texts, strict=True) if _ENDING.search(text)]


def near_sentence_end(recent_ids: torch.Tensor, sentence_ids: torch.Tensor) -> torch.Tensor:
    """
    Whether a token is one of the first of a sentence, `(...)` `bool`.

    Args:
        recent_ids (`torch.Tensor` of shape `(..., span)`):
            The ids before the token, prompt included, as many as a sentence's first tokens are; -1 where there is
            none.
        sentence_ids (`torch.Tensor` of shape `(N,)`):
            See [`sentence_endings`].

    Example:
    ```python
    >>> near_sentence_end(torch.tensor([[7, 5], [5, 7], [-1, 6]]), torch.tensor([5]))
    tensor([ True,  True, False])
    ```
    """
    return torch.isin(recent_ids, sentence_ids.to(recent_ids)).any(dim=-1)
