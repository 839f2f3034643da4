import torch

from mentor_trl.rollout.types import BOOL_RECORDS, FLOAT_RECORDS, RECORDS, MixedRollout


def test_parts_are_as_long_as_their_own_longest_completion():
    """The trainer pads the tokens of a process to its own longest row, which another's may exceed."""
    lengths = [2, 3, 7, 1]
    numbers = torch.arange(28.0).view(4, 7)
    records = dict.fromkeys(FLOAT_RECORDS, numbers) | dict.fromkeys(BOOL_RECORDS, numbers > 9)
    whole = MixedRollout([[5] * length for length in lengths], **records, stats={"seconds": 2.0})
    parts = whole.split([2, 0, 2])
    assert [part.logps.shape for part in parts] == [(2, 3), (0, 0), (2, 7)]
    for part, rows in zip(parts, (slice(0, 2), slice(2, 2), slice(2, 4)), strict=True):
        assert part.completion_ids == whole.completion_ids[rows]
        for name in RECORDS:
            expected = getattr(whole, name)[rows, : part.logps.size(1)]
            assert torch.equal(getattr(part, name), expected)
            assert getattr(part.padded(9), name).shape == (len(part.completion_ids), 9)
    assert [part.stats["tokens"] for part in parts] == [5, 0, 8]
