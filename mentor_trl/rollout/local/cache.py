"""A key-value cache whose rows have their own lengths, so that speculation can be rolled back row by row."""

import torch
from transformers import Cache


class RaggedCache(Cache):
    """
    Key-value cache of `slots` rows that begin at position 0 and have any length.

    Rolling back is setting a smaller length: what lies beyond is overwritten before it is attended to. The buffers
    grow by half when they are full.

    Args:
        slots (`int`, *optional*, defaults to `0`):
            Number of rows to begin with.
    """

    def __init__(self, slots: int = 0):
        super().__init__(layers=[])
        self.slots = slots
        self.capacity = 0
        self.bound: int | None = None
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._rows: torch.Tensor | int = 0
        self._flat_positions: torch.Tensor | None = None
        self._length = 0

    def reserve(self, length: int, slots: int = 0, bound: int | None = None) -> None:
        """Make room."""
        self.bound = bound or self.bound
        if length <= self.capacity and slots <= self.slots:
            return
        self.slots = max(slots, self.slots)
        if length > self.capacity:
            grown = self.capacity + self.capacity // 2
            self.capacity = max(length, grown if self.bound is None else min(grown, self.bound))
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = old.new_zeros((self.slots, self.capacity, *old.shape[2:]))
                buffers[layer][: old.size(0), : old.size(1)] = old

    def place(self, rows: torch.Tensor | int, positions: torch.Tensor, length: int) -> None:
        """Say where the next forward pass writes and what it reads."""
        self._rows, self._length = rows, length
        slots = torch.arange(rows, device=positions.device) if isinstance(rows, int) else rows
        self._flat_positions = (slots.unsqueeze(1) * self.capacity + positions).flatten()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == len(self.keys):
            for buffers, states in ((self.keys, key_states), (self.values, value_states)):
                heads, size = states.size(1), states.size(3)
                buffers.append(states.new_zeros((self.slots, self.capacity, heads, size)))
        return self._write(self.keys[layer_idx], key_states), self._write(self.values[layer_idx], value_states)

    def update_conv_state(self, *args, **kwargs):
        raise NotImplementedError("a recurrent state cannot be rolled back")

    def update_recurrent_state(self, *args, **kwargs):
        raise NotImplementedError("a recurrent state cannot be rolled back")

    def _write(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        rows = states.transpose(1, 2).flatten(0, 1).to(buffer.dtype)
        buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self._flat_positions.to(buffer.device), rows)
        read = buffer[: self._rows] if isinstance(self._rows, int) else buffer[self._rows]
        return read[:, : self._length].transpose(1, 2)

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of rows onto other rows, all at once."""
        for buffer in (*self.keys, *self.values):
            buffer[targets, :length] = buffer[sources, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1
