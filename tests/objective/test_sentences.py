import pytest
import torch

from helpers import CHARACTERS, make_tiny_tokenizer
from mentor_trl.objective import branch_weight, near_sentence_end, sentence_endings


class Words:
    """A tokenizer of whole words."""

    all_special_ids = [0]

    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}

    def batch_decode(self, rows, **kwargs):
        return ["".join(self.words[index] for index in row) for row in rows]


def test_endings_of_words():
    ending = [".", "?", ' end."', "!)", "…", "。", "\n", " x\n\n", ".  ", ".**"]
    other = [" a", ",", ":", "...a", "-", "", " "]
    words = Words("<eos>.", *ending, *other)
    assert [words.words[index] for index in sentence_endings(words)] == ending


def test_endings_of_a_tokenizer():
    tokenizer = make_tiny_tokenizer()
    texts = tokenizer.convert_ids_to_tokens(sentence_endings(tokenizer))
    assert set(texts) == set(".?!\n") and set(texts) <= set(CHARACTERS)


@pytest.mark.parametrize("span, expected", [(1, [0, 1, 0, 0, 0]), (3, [0, 1, 1, 1, 0])])
def test_weight_of_the_first_tokens_of_a_sentence(span, expected):
    ids = torch.tensor([3, 9, 4, 5, 6, 7])
    before = torch.nn.functional.pad(ids, (span, 0), value=-1).unfold(0, span, 1)[1:-1]  # those of 9, 4, 5, 6, 7
    near = near_sentence_end(before, torch.tensor([9]))
    weight = branch_weight(torch.ones(5), 1.0, "sentence", share=0.25, near=near)
    assert weight.tolist() == [0.25 * value for value in expected]
    assert not branch_weight(torch.ones(5), torch.inf, "sentence", share=0.25, near=near).any()
