"""Records of rows in progress, without an engine."""

import pytest
import torch

from mentor_trl.vllm_plugin.records import VALUES, RecordStore, unpack


def round_of(*rows: list[int], width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and values of a round, where every value of a token is the token itself."""
    tokens = torch.tensor([ids + [-1] * (width - len(ids)) for ids in rows])
    return tokens, tokens.float().unsqueeze(-1).expand(*tokens.shape, len(VALUES)).clone()


def test_rounds_are_joined_and_forgotten():
    store = RecordStore()
    store.append(["a", None, "b"], [4, 9, 2], *round_of([5, 6], [1], [7, 8, 9]))
    store.append(["b", "a"], [5, 6], *round_of([3], [2, 1]))
    found = store.take(["b", "unknown", "a"])
    assert found[1] is None
    start, ids, values = unpack(found[0])
    assert (start, ids) == (2, [7, 8, 9, 3]) and values[:, 5].tolist() == [7.0, 8.0, 9.0, 3.0]
    assert unpack(found[2])[:2] == (4, [5, 6, 2, 1])
    assert not store.rows and store.size == 0


def test_a_position_sampled_twice_counts_as_last_sampled():
    store = RecordStore()
    store.append(["a"], [2], *round_of([5, 6]))
    store.append(["a"], [3], *round_of([8, 9]))
    start, ids, values = unpack(store.take(["a"])[0])
    assert (start, ids) == (2, [5, 8, 9]) and values[:, 0].tolist() == [5.0, 8.0, 9.0]


def test_gaps_are_refused():
    store = RecordStore()
    store.append(["a"], [2], *round_of([5]))
    store.append(["a"], [4], *round_of([5]))
    with pytest.raises(RuntimeError, match="'a' have gaps"):
        store.take(["a"])


def test_rows_that_nobody_fetches_make_room():
    store = RecordStore(capacity=20)
    for row in range(10):
        store.append([f"{row}", "long"], [0, row], *round_of([1], [2]))
    assert store.size <= 20
    assert store.take(["0"]) == [None] and store.take(["9"]) != [None]
