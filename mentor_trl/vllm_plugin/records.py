"""Per-token records of rows in progress, kept where they arise until they are fetched."""

import base64
from collections import OrderedDict
from dataclasses import dataclass

import torch


VALUES = ("entropies", "weights", "logps", "expert_logps", "branch", "replaced")
# About half a gigabyte: far more than a batch of rollouts, so that only rows which nobody fetches are dropped
CAPACITY = 1 << 24


@dataclass
class _Block:
    """A round of all rows: `tokens (B, S)` and `values (B, S, 6)`, shared by the rows that are recorded."""

    tokens: torch.Tensor
    values: torch.Tensor
    rows: int = 0


class RecordStore:
    """
    Records by key. A round appends the tensors of all its rows at once; nothing is copied from the device before a
    fetch. Beyond `capacity` tokens, the rows that began first are dropped.
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self.size = 0
        self.rows: OrderedDict[str, list[tuple[int, int, _Block]]] = OrderedDict()

    def append(self, keys: list[str | None], starts: list[int], tokens: torch.Tensor, values: torch.Tensor) -> None:
        """
        Store a round: `tokens (B, S)`, -1 behind a row's last, and their [`VALUES`] `(B, S, 6)`. `keys` are `None` for
        rows that are not recorded; `starts` are the positions of the first new tokens, prompts included.
        """
        block = _Block(tokens, values)
        for index, (key, start) in enumerate(zip(keys, starts)):
            if key is not None:
                self.rows.setdefault(key, []).append((start, index, block))
                block.rows += 1
        self.size += tokens.numel() if block.rows else 0
        while self.size > self.capacity and len(self.rows) > 1:
            self._forget(next(iter(self.rows)))

    def take(self, keys: list[str]) -> list[dict | None]:
        """
        Hand over the records of rows and forget them: for each key its `start` (position of the first token), and in
        base64 its `tokens` (int32) and `values` (float32, 6 a token), or `None` where the key is unknown.
        """
        blocks = {id(block): block for key in keys for _, _, block in self.rows.get(key, ())}
        on_host = {name: (block.tokens.to("cpu"), block.values.to("cpu")) for name, block in blocks.items()}
        return [self._pack(key, on_host) if key in self.rows else None for key in keys]

    def _pack(self, key: str, blocks) -> dict:
        sampled: dict[int, tuple[int, torch.Tensor]] = {}
        for start, index, block in self.rows[key]:
            ids, numbers = (part[index] for part in blocks[id(block)])
            length = int((ids >= 0).sum())
            # a position sampled twice (its first sample was never committed) counts as last sampled
            sampled |= zip(range(start, start + length), zip(ids.tolist(), numbers))
        self._forget(key)
        order = sorted(sampled)
        if order[-1] - order[0] + 1 != len(order):
            raise RuntimeError(f"The records of row {key!r} have gaps: positions {order}.")
        tokens, values = zip(*(sampled[at] for at in order))
        packed = {"tokens": torch.tensor(tokens, dtype=torch.int32), "values": torch.stack(values).float()}
        encoded = {name: base64.b64encode(part.numpy().tobytes()).decode() for name, part in packed.items()}
        return {"start": order[0], **encoded}

    def _forget(self, key: str) -> None:
        for _, _, block in self.rows.pop(key):
            block.rows -= 1
            self.size -= 0 if block.rows else block.tokens.numel()


def unpack(record: dict) -> tuple[int, list[int], torch.Tensor]:
    """What [`RecordStore.take`] packed: the position of the first token, the ids, and the `(T, 6)` values."""
    ids = torch.frombuffer(bytearray(base64.b64decode(record["tokens"])), dtype=torch.int32)
    values = torch.frombuffer(bytearray(base64.b64decode(record["values"])), dtype=torch.float32)
    return record["start"], ids.tolist(), values.view(-1, len(VALUES))
