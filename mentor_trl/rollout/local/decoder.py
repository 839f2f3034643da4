"""One causal language model behind a ragged key-value cache."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch

from ...experts.compatibility import context_length, text_model
from . import attention as ragged
from .cache import RaggedCache


# Bounds on what a single operation holds, whatever the number of rows, their length and the vocabulary
MAX_LOGITS = 2**24
MAX_PREFILL_TOKENS = 8192
MAX_CATCH_UP = 256
# Positions that a cache starts with, at most
FIRST_RESERVE = 512
# Of a model's argument; transformers 5.24 gave all of them the last one
CACHE_NAMES = ("past_key_values", "cache_params", "cache")


@contextmanager
def inference(model, attention: str = ragged.NAME) -> Iterator[None]:
    """
    Dropout off in every module, and an attention that takes a mask per row; the former state is restored on exit.
    """
    base = text_model(model)
    config = base.config.get_text_config()
    former = config._attn_implementation
    training = [module for module in model.modules() if module.training]
    model.eval()
    capped = getattr(config, "attn_logit_softcapping", None) is not None or not base._supports_sdpa
    # A model with attention code of its own (Falcon) does not ask for an implementation by name, and adds the mask
    by_name = base._supports_attention_backend or attention != ragged.NAME
    own = former == "eager" or (former != "sdpa" and capped) or not by_name
    config._attn_implementation = "eager" if own else attention
    try:
        yield
    finally:
        config._attn_implementation = former
        for module in training:
            module.training = True


def logit_rows(vocab_size: int) -> int:
    """Rows whose logits over a vocabulary are held at once."""
    return max(1, MAX_LOGITS // vocab_size)


class Decoder:
    """
    Incremental decoding of rows of different lengths, each of which can be rolled back on its own.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        slots (`int`, *optional*, defaults to `0`):
            Number of rows of the cache to begin with.
        autocast (`Callable[[], AbstractContextManager]`, *optional*):
            Makes the mixed-precision context of the forward passes.
        float32_head (`bool`, *optional*, defaults to `False`):
            Whether the LM head runs in float32, outside of that context (TRL's `cast_lm_head_to_fp32`).
    """

    lockstep = False

    def __init__(
        self,
        model,
        slots: int = 0,
        autocast: Callable[[], AbstractContextManager] | None = None,
        float32_head: bool = False,
    ):
        self.model = text_model(model)
        self.config = self.model.config.get_text_config()
        embedding = self.model.get_input_embeddings().weight
        self.device, self.num_embeddings = embedding.device, embedding.size(0)
        self.lm_head = self.model.get_output_embeddings()
        self.vocab_size = self.lm_head.weight.size(0)
        self.autocast = autocast or nullcontext
        self.float32_head = float32_head
        takes = inspect.signature(self.model.base_model.forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in takes), None)
        self.cache = RaggedCache(slots)
        self.prompts: dict[int, tuple[int, ...]] = {}

    @property
    def max_length(self) -> int | None:
        """Context in tokens, see [`~mentor_trl.experts.compatibility.context_length`]."""
        return context_length(self.config)

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return self.model.num_parameters()

    @property
    def rows_per_chunk(self) -> int:
        """Rows whose logits are held at once."""
        return logit_rows(self.vocab_size)

    def reserve(self, length: int, slots: int = 0, bound: int | None = None) -> None:
        """Make room in the cache."""
        self.cache.reserve(length, slots, bound)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, T, D)` of whole rows, which may be padded on the right."""
        rows, width = ids.shape
        self.reserve(width, rows)
        return self.forward(ids, torch.arange(width, device=self.device).expand_as(ids), rows, width)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | int, length: int):
        """Hidden states of new tokens, which enter the cache."""
        # a policy with a larger padded vocabulary may emit ids that the expert has no embedding of
        ids = ids.to(self.device).clamp(max=self.num_embeddings - 1)
        positions = positions.to(self.device)
        self.reserve(length)
        self.cache.place(rows, positions, length)
        with self.autocast():
            outputs = self.model.base_model(
                input_ids=ids,
                attention_mask=self._mask(positions, length),
                position_ids=positions,
                use_cache=True,
                **{self._cache_name or CACHE_NAMES[0]: self.cache},
            )
        return outputs.last_hidden_state

    def _mask(self, positions: torch.Tensor, length: int):
        keys = torch.arange(length, device=positions.device)
        queries = positions[:, None, :, None]
        causal = keys <= queries
        window = getattr(self.config, "sliding_window", None)
        layer_types = set(getattr(self.config, "layer_types", None) or ())
        if window is None or layer_types == {"full_attention"}:
            return self._as_attention_mask(causal)
        sliding = self._as_attention_mask(causal & (keys > queries - window))
        if not layer_types:
            return sliding
        return {"full_attention": self._as_attention_mask(causal), "sliding_attention": sliding}

    def _as_attention_mask(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation != "eager":
            return allowed
        zero = torch.zeros((), dtype=self.model.dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(self.model.dtype).min)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits `(N, V)` of hidden states `(N, D)`, as the model itself makes them."""
        hidden = hidden.to(self.lm_head.weight.device)
        if self.float32_head:
            with torch.autocast(hidden.device.type, enabled=False):
                logits = self.lm_head(hidden.float())
        else:
            if self.lm_head.weight.dtype in (torch.bfloat16, torch.float16):
                hidden = hidden.to(self.lm_head.weight.dtype)  # Mamba keeps its residuals in float32
            with self.autocast():
                logits = self.lm_head(hidden)
        logits = logits.to(self.device).float()
        scale = getattr(self.config, "logit_scale", None) or getattr(self.config, "lm_head_multiplier", None)
        divisor = getattr(self.config, "logits_scaling", None)
        cap = getattr(self.config, "final_logit_softcapping", None) or getattr(self.config, "logits_soft_cap", None)
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def prefill(self, slots: list[int], prompts: list[tuple[int, ...]]) -> None:
        """
        Bring all but the last token of each prompt into its slot. A prompt that some slot holds already is copied, and
        a prompt that several slots need is computed once.
        """
        held = {prompt: slot for slot, prompt in self.prompts.items()}
        computed: dict[tuple[int, ...], int] = {}
        known, repeated = [], []
        for slot, prompt in zip(slots, prompts, strict=True):
            if self.prompts.get(slot) == prompt:
                continue
            if prompt in held:
                known.append((held[prompt], slot))
            elif prompt in computed:
                repeated.append((computed[prompt], slot))
            else:
                computed[prompt] = slot
        length = max(len(prompt) for prompt in prompts) - 1
        self.prompts.update(zip(slots, prompts, strict=True))
        if known and length:
            self.reserve(length)
            self.cache.copy_rows(*map(list, zip(*known, strict=True)), length)
        self._compute(sorted(computed.items(), key=lambda item: len(item[0])))
        if repeated and length:
            self.cache.copy_rows(*map(list, zip(*repeated, strict=True)), length)

    def _compute(self, items: list[tuple[tuple[int, ...], int]]) -> None:
        while items:
            size = max(1, MAX_PREFILL_TOKENS // max(len(items[-1][0]), 1))
            chunk, items = items[-size:], items[:-size]
            length = max(len(prompt) for prompt, _ in chunk) - 1
            if length == 0:
                continue
            ids = torch.zeros((len(chunk), length), dtype=torch.long)
            for i, (prompt, _) in enumerate(chunk):
                ids[i, : len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.long)
            rows = torch.tensor([slot for _, slot in chunk], device=self.device)
            self.forward(ids, torch.arange(length).expand_as(ids), rows, length)

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of slots, and their prompts, onto other slots."""
        if self.cache.capacity:
            self.cache.copy_rows(sources, targets, length)
        held = [self.prompts.get(source) for source in sources]
        for target, prompt in zip(targets, held):
            if prompt is None:
                self.prompts.pop(target, None)
            else:
                self.prompts[target] = prompt


def refuse_nan(values: torch.Tensor, name: str, error: type[ValueError] = ValueError) -> None:
    """Raise an error that names the model if there is a NaN."""
    if values.isnan().any():
        raise error(
            f"The {name}'s logits are NaN. Its weights are broken or its data type overflows: check the {name}'s "
            "checkpoint, lower the learning rate, or load it in bfloat16 or float32."
        )
