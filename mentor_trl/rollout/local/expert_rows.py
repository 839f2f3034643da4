"""The rows that an expert is asked about: the mixed ones among those in progress."""

from functools import cached_property

import torch

from ...experts.port import Expert
from .in_process import InProcessExpert


def closed_gaps(count: int, free: list[int]) -> tuple[list[int], list[int]]:
    """Which of `count` places move to which free ones, so that those in use stay in front."""
    left = count - len(free)
    return [place for place in range(left, count) if place not in free], [place for place in free if place < left]


class ExpertRows:
    """
    Mixed rows in places of their own, so that an expert of this process has a cache for them alone.

    Args:
        expert ([`~mentor_trl.experts.port.Expert`], *optional*):
            The expert, if there are mixed rows.
        places (`int`):
            Mixed rows in progress at once, at most.
        width (`int`):
            Tokens of a row, at most.
        device (`torch.device`):
            Device of the rows' state.
    """

    def __init__(self, expert: Expert | None, places: int, width: int, device: torch.device):
        self.device = device
        self.reader = expert if isinstance(expert, InProcessExpert) and places else None
        self.slots: list[int] = []  # the engine's slot of each place
        self._free: list[int] = []
        if self.reader is not None:
            self.reader.begin(places, width, device)

    @cached_property
    def index(self) -> torch.Tensor:
        """The engine's slot of each place."""
        return torch.tensor(self.slots, dtype=torch.long, device=self.device)

    def leave(self, slots: list[int]) -> None:
        """Rows are finished."""
        self._free = [place for place, slot in enumerate(self.slots) if slot in set(slots)]

    def admit(self, slot: int, prompt: tuple[int, ...]) -> None:
        """A new mixed row takes a slot."""
        if self._free:
            place = self._free.pop(0)
            self.slots[place] = slot
        else:
            place = len(self.slots)
            self.slots.append(slot)
        self._changed()
        if self.reader is not None:
            self.reader.admit(place, prompt)

    def close(self, sizes: list[int]) -> None:
        """Fill the gaps that finished rows leave with the last rows; `sizes` are the tokens in the engine's slots."""
        if not self._free:
            return
        sources, targets = closed_gaps(len(self.slots), self._free)
        if targets:
            if self.reader is not None:
                self.reader.move(sources, targets, max(sizes[self.slots[place]] for place in sources))
            for source, target in zip(sources, targets):
                self.slots[target] = self.slots[source]
        del self.slots[len(self.slots) - len(self._free) :]
        self._free = []
        self._changed()

    def moved(self, sources: list[int], targets: list[int]) -> None:
        """Rows went over to other slots of the engine."""
        names = dict(zip(sources, targets))
        self.slots = [names.get(slot, slot) for slot in self.slots]
        self._changed()

    def committed(self, size: torch.Tensor) -> None:
        """After a consultation, `size` tokens of the row in each slot stand."""
        if self.reader is not None:
            self.reader.committed(size[self.index])

    def _changed(self) -> None:
        self.__dict__.pop("index", None)
