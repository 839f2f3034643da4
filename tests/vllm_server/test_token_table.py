"""Which id ends a request at a branch point, and what of the tokens a server and its clients agree on."""

import pytest
from tokenizers import AddedToken

from helpers import make_letter_tokenizer
from mentor_trl.errors import SetupError
from mentor_trl.objective import sentence_endings
from mentor_trl.vllm_server.token_table import TokenTable, branch_id


def test_padding_ends_requests():
    assert branch_id(100, 128, special=[99], stop_ids=[]) == 127
    assert branch_id(127, 128) == 127


def test_a_special_token_does_where_there_is_no_padding():
    assert branch_id(128, 128, special=[5, 126, 127], stop_ids=[127]) == 126


@pytest.mark.parametrize(("special", "stops"), [([], []), ([3, 7], [7, 3])])
def test_nothing_is_left(special, stops):
    with pytest.raises(SetupError, match=r"All 128 rows .* `resize_token_embeddings\(129\)`"):
        branch_id(128, 128, special, stops)


def test_too_few_rows():
    with pytest.raises(SetupError, match=r"defines 129 ids, and the policy has rows for 128.*embeddings\(130\)"):
        branch_id(129, 128)


def test_the_table_of_a_tokenizer():
    tokenizer = make_letter_tokenizer("ab.!")
    rows = len(tokenizer.get_vocab())
    padded = TokenTable.of(tokenizer, rows + 8)
    assert (padded.num_tokens, padded.branch_id) == (rows, rows + 7)
    assert padded.sentence_ids == tuple(sentence_endings(tokenizer)) != ()
    assert TokenTable.of(tokenizer, rows + 9).digest == padded.digest
    assert TokenTable.of(make_letter_tokenizer("abc!"), 32).digest != padded.digest

    # Special tokens that nobody names as one of a kind, as Llama's reserved ones
    tokenizer.add_tokens([AddedToken(f"<reserved_{index}>", special=True) for index in range(2)])
    assert TokenTable.of(tokenizer, rows + 2).branch_id == rows + 1
    assert TokenTable.of(tokenizer, rows + 2, stop_ids=[rows + 1]).branch_id == rows
