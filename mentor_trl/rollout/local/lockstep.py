"""Models whose state cannot be rolled back: rows that advance together, behind transformers' own caches."""

import inspect
from dataclasses import dataclass

import torch

from .decoder import Decoder


@dataclass(frozen=True)
class Ability:
    """
    How the rows of a model can advance.

    Args:
        ragged (`bool`, *optional*, defaults to `True`):
            Whether each row has its own length, and can be rolled back.
        blocks (`bool`, *optional*, defaults to `True`):
            Whether several tokens can be appended in one pass.
        reason (`str`, *optional*):
            Why the rows are not ragged.
    """

    ragged: bool = True
    blocks: bool = True
    reason: str | None = None

    @property
    def attention(self) -> dict[str, str]:
        """What [`~mentor_trl.rollout.local.decoder.inference`] is to attend by."""
        return {} if self.ragged else {"attention": "sdpa"}

    def decoder(self, model, **options) -> Decoder:
        """Decoder of a model with this ability."""
        return Decoder(model, **options) if self.ragged else LockstepDecoder(model, blocks=self.blocks, **options)


RAGGED = Ability()


class LockstepDecoder(Decoder):
    """
    Decoding of rows that are read at once, padded on the left, and then take equally many tokens each.

    Nothing that was read can be taken back. Rows that are moved over or left out give up their place in the cache
    when a quarter of it is idle.

    Args:
        blocks (`bool`):
            Whether several tokens can be appended in one pass.
        model, options:
            See [`Decoder`].
    """

    lockstep = True

    def __init__(self, model, blocks: bool, **options):
        super().__init__(model, **options)
        self.blocks = blocks
        self._takes_positions = "position_ids" in inspect.signature(self.model.base_model.forward).parameters
        self._states = None  # transformers' cache
        self._mask = torch.empty(0, 0)
        self._held: torch.Tensor | None = None
        self._places = torch.empty(0)

    def reserve(self, length: int, slots: int = 0, bound: int | None = None) -> None:
        """The cache grows by itself."""

    def prefill(self, slots: list[int], prompts: list[tuple[int, ...]]) -> None:
        """Begin with `prompts`, which take the first slots. Equal ones are computed once."""
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        ids = torch.zeros((len(distinct), width), dtype=torch.long, device=self.device)
        self._mask = torch.zeros_like(ids)
        for row, prompt in enumerate(distinct):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=self.device)
            self._mask[row, width - len(prompt) :] = 1
        self._states = None
        # The last token of a prompt is read with it: a row of one token would else be nothing but padding
        self._held = self._append(ids)[:, -1:]
        if len(distinct) < len(prompts):
            number = {prompt: row for row, prompt in enumerate(distinct)}
            self._select(torch.tensor([number[prompt] for prompt in prompts], device=self.device))
        self._places = torch.arange(len(prompts), device=self.device)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, rows: int, length: int) -> torch.Tensor:
        """
        Hidden states of the next tokens `(B, Q)` of the first `rows` slots. The first token after `prefill` is the
        prompt's last.
        """
        if 4 * rows <= 3 * len(self._mask):
            self._select(self._places[:rows])
            self._places = torch.arange(rows, device=self.device)
        at, hidden = self._places[:rows], []
        if self._held is not None:
            hidden.append(self._held[at])
            ids, self._held = ids[:, 1:], None
        padded = torch.zeros((len(self._mask), ids.size(1)), dtype=torch.long, device=self.device)
        padded[at] = ids.to(self.device)
        for block in padded.split(max(ids.size(1), 1) if self.blocks else 1, dim=1):
            if block.size(1):
                self._mask = torch.cat([self._mask, torch.ones_like(block)], dim=1)
                hidden.append(self._append(block)[at])
        return torch.cat(hidden, dim=1)

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Let slots go over to other slots."""
        self._places[targets] = self._places[sources]

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, T, D)` of whole rows, which may be padded on the right."""
        with self.autocast():
            return self.model.base_model(input_ids=ids.clamp(max=self.num_embeddings - 1), use_cache=False)[0]

    def _append(self, ids: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids.clamp(max=self.num_embeddings - 1), "attention_mask": self._mask}
        if self._takes_positions:
            inputs["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :]
        if self._mask.size(1) > ids.size(1) and self._cache_name:
            inputs[self._cache_name] = self._states
            if not any(hasattr(layer, "keys") for layer in getattr(self._states, "layers", ())):
                del inputs["attention_mask"]  # nothing but states: what is masked is in them
        with self.autocast():
            outputs = self.model.base_model(**inputs, use_cache=True)
        self._states = outputs.get(self._cache_name)
        return outputs.last_hidden_state

    def _select(self, rows: torch.Tensor) -> None:
        if self._states is None:
            raise NotImplementedError("it keeps its states to itself")
        self._states.reorder_cache(rows)
        self._mask = self._mask[rows]
        if self._held is not None:
            self._held = self._held[rows]
