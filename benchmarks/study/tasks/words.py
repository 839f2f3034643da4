"""What the tasks share: a tokenizer whose tokens are words, and reading what a model has written."""

from transformers import PreTrainedTokenizerFast


PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL = [PAD, EOS, UNKNOWN]


def word_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the words of a vocabulary. It has no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )


def whole_reply(prompt: str, completion: str) -> str:
    """
    Return a reply with what a hint behind the prompt's colon has said of it already.

    >>> whole_reply("4 +7 : try red", "4 +7 = 1")
    'try red 4 +7 = 1'
    """
    return f"{prompt.partition(':')[2]} {completion}".strip()
