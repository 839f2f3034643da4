import torch

from mentor_trl.rollout.local.cache import RaggedCache


def states(*values):
    """`(B, heads=1, Q, size=1)` from a list of token values a row."""
    return torch.tensor(values, dtype=torch.float32)[:, None, :, None]


def write(cache, rows, positions, values, length, layer=0):
    cache.place(rows, torch.tensor(positions), length)
    keys, others = cache.update(states(*values), -states(*values), layer)
    assert torch.equal(others, -keys)
    return keys[:, 0, :, 0].tolist()


def test_rows_have_their_own_positions():
    cache = RaggedCache(3)
    cache.reserve(4)
    assert write(cache, 3, [[0, 1], [0, 1], [0, 1]], [[1, 2], [3, 4], [5, 6]], 2) == [[1, 2], [3, 4], [5, 6]]
    # row 0 goes on at 2, row 1 is rolled back to 1, row 2 goes on at 2
    assert write(cache, 3, [[2], [1], [2]], [[7], [8], [9]], 3) == [[1, 2, 7], [3, 8, 0], [5, 6, 9]]


def test_a_batch_of_some_slots():
    cache = RaggedCache(4)
    cache.reserve(2)
    rows = torch.tensor([3, 1])
    assert write(cache, rows, [[0, 1], [0, 1]], [[1, 2], [3, 4]], 2) == [[1, 2], [3, 4]]
    assert cache.keys[0][:, :, 0, 0].tolist() == [[0, 0], [3, 4], [0, 0], [1, 2]]


def test_growing_keeps_the_content():
    cache = RaggedCache(2)
    cache.reserve(2)
    write(cache, 2, [[0, 1], [0, 1]], [[1, 2], [3, 4]], 2)
    cache.reserve(3)
    assert cache.capacity == 3 and cache.keys[0].shape == cache.values[0].shape == (2, 3, 1, 1)
    assert write(cache, 2, [[2], [2]], [[5], [6]], 3) == [[1, 2, 5], [3, 4, 6]]
    cache.reserve(4)  # grows by half of 3 at least
    assert cache.capacity == 4
    cache.reserve(5)
    assert cache.capacity == 6
    cache.reserve(2)
    assert cache.capacity == 6
    assert cache.values[0][:, :3, 0, 0].tolist() == [[-1, -2, -5], [-3, -4, -6]]


def test_copying_rows_is_simultaneous():
    cache = RaggedCache(3)
    cache.reserve(3)
    write(cache, 3, [[0, 1, 2]] * 3, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], 3)
    cache.copy_rows([0, 1], [1, 0], 2)
    assert cache.keys[0][:, :, 0, 0].tolist() == [[4, 5, 3], [1, 2, 6], [7, 8, 9]]
    cache.copy_rows([2, 2], [0, 1], 3)
    assert cache.keys[0][:, :, 0, 0].tolist() == [[7, 8, 9]] * 3
    assert cache.values[0][:, :, 0, 0].tolist() == [[-7, -8, -9]] * 3


def test_layers_are_apart():
    cache = RaggedCache(1)
    cache.reserve(1)
    write(cache, 1, [[0]], [[1]], 1, layer=0)
    write(cache, 1, [[0]], [[2]], 1, layer=1)
    assert [buffer.item() for buffer in cache.keys] == [1.0, 2.0]
    assert cache.get_seq_length() == 1
