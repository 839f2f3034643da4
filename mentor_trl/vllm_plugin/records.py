"""Per-token records of rows in progress, kept where they arise until they are fetched."""

import base64
from collections import OrderedDict

import torch


VALUES = ("entropies", "weights", "logps", "expert_logps", "branch", "replaced")
# About half a gigabyte: far more than a batch of rollouts, so that only rows which nobody fetches are dropped
CAPACITY = 1 << 24


class RecordStore:
    """
    Records by key. A round appends the tensors of all its rows at once; nothing is copied from the device before a
    fetch.

    Args:
        capacity (`int`, *optional*):
            Tokens kept. Beyond it, the rows that began first are dropped.
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self.size = 0
        self.rows: OrderedDict[str, list[tuple[int, torch.Tensor, torch.Tensor, int]]] = OrderedDict()

    def append(self, keys: list[str | None], starts: list[int], tokens: torch.Tensor, values: torch.Tensor) -> None:
        """
        Store a round.

        Args:
            keys (`list[str | None]`):
                Key of each row; `None` for rows that are not recorded.
            starts (`list[int]`):
                Position in its row, prompt included, of each row's first new token.
            tokens (`torch.Tensor` of shape `(B, S)`):
                Committed tokens, -1 behind the last.
            values (`torch.Tensor` of shape `(B, S, 6)`):
                [`VALUES`] of each.
        """
        for index, (key, start) in enumerate(zip(keys, starts)):
            if key is not None:
                self.rows.setdefault(key, []).append((start, tokens, values, index))
                self.size += tokens.size(1)
        while self.size > self.capacity and len(self.rows) > 1:
            self._forget(next(iter(self.rows)))

    def take(self, keys: list[str]) -> list[dict]:
        """
        Hand over the records of rows and forget them.

        Args:
            keys (`list[str]`):
                Keys.

        Returns:
            `list[dict]`, one a key: `start` (position of the first token) and base64 of `tokens` (int32) and of
            `values` (float32, 6 a token), or `None` where the key is unknown.
        """
        blocks = {id(piece[1]): piece[1:3] for key in keys for piece in self.rows.get(key, ())}
        on_host = {name: (tokens.to("cpu"), values.to("cpu")) for name, (tokens, values) in blocks.items()}
        return [self._pack(key, on_host) if key in self.rows else None for key in keys]

    def _pack(self, key: str, blocks) -> dict:
        tokens: dict[int, int] = {}
        values: dict[int, torch.Tensor] = {}
        for start, block, _, index in self.rows[key]:
            ids, numbers = blocks[id(block)]
            for offset, token in enumerate(ids[index].tolist()):
                if token < 0:
                    break
                # a position sampled twice (its first sample was never committed) counts as last sampled
                tokens[start + offset], values[start + offset] = token, numbers[index, offset]
        self._forget(key)
        order = sorted(tokens)
        packed = torch.stack([values[at] for at in order]).float() if order else torch.empty(0, len(VALUES))
        ids = torch.tensor([tokens[at] for at in order], dtype=torch.int32)
        if order and order[-1] - order[0] + 1 != len(order):
            raise RuntimeError(f"The records of row {key!r} have gaps: positions {order}.")
        return {
            "start": order[0] if order else 0,
            "tokens": base64.b64encode(ids.numpy().tobytes()).decode(),
            "values": base64.b64encode(packed.numpy().tobytes()).decode(),
        }

    def _forget(self, key: str) -> None:
        self.size -= sum(piece[1].size(1) for piece in self.rows.pop(key))


def unpack(record: dict) -> tuple[int, list[int], torch.Tensor]:
    """
    Read what [`RecordStore.take`] packed.

    Returns:
        `tuple` of the position of the first token, the token ids and the `(T, 6)` values.
    """
    ids = torch.frombuffer(bytearray(base64.b64decode(record["tokens"])) or bytearray(4), dtype=torch.int32)
    data = bytearray(base64.b64decode(record["values"]))
    if not data:
        return record["start"], [], torch.empty(0, len(VALUES))
    return record["start"], ids.tolist(), torch.frombuffer(data, dtype=torch.float32).view(-1, len(VALUES))
