"""An estimate of the memory that a run takes on one device: right to a few tens of percent, not more."""

from dataclasses import dataclass, replace
from typing import Any

from .models import ModelFacts


GIB = 2.0**30
# A weight in 4 bits, with the constants of its quantization
FOUR_BIT = 0.57
LORA_RANK = 32
# Of a device, what a run can fill, and what Python, CUDA and their libraries take
USABLE, LIBRARIES = 0.92, 0.8 * GIB


@dataclass(frozen=True)
class Load:
    """
    What takes memory on one device.

    Attributes:
        policy, expert ([`ModelFacts`]): The models in this process; a served expert is none of them.
        prompt, completion (`int`): Tokens of the longest prompt, and of a completion.
        batch (`int`): Rows of a forward and backward pass.
        rows (`int`): Rows that are sampled at once.
        checkpointing (`bool`): Whether activations are computed again in the backward pass.
        lora (`int`): Rank of the adapter, 0 for full training.
        policy_bytes, expert_bytes (`float`): Bytes of a weight.
        cache_bytes, compute_bytes (`int`): Bytes of a number in the caches and of one in the forward pass.
        reference (`bool`): Whether there is a reference model (`beta` above 0 without LoRA).
        shards (`int`): Processes over which ZeRO-2 parts gradients and optimizer.
        engine (`float`): Bytes that vLLM takes in this process.
        engine_sleeps (`bool`): Whether it gives them back while the policy is trained.
    """

    policy: ModelFacts
    expert: ModelFacts | None
    prompt: int
    completion: int
    batch: int = 8
    rows: int = 64
    checkpointing: bool = False
    lora: int = 0
    policy_bytes: float = 4.0
    expert_bytes: float = 2.0
    cache_bytes: int = 2
    compute_bytes: int = 2
    reference: bool = False
    shards: int = 1
    engine: float = 0.0
    engine_sleeps: bool = False

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return self.policy.adapter_parameters(self.lora) if self.lora else self.policy.parameters

    @property
    def trained_bytes(self) -> float:
        """Bytes of a trained weight, its gradient, and each of the optimizer's two moments."""
        return 4.0 if self.lora else self.policy_bytes

    def parts(self) -> dict[str, float]:
        """Bytes of each part."""
        length, trained = self.prompt + self.completion, self.trained
        caches = sum(model.cached_numbers for model in (self.policy, self.expert) if model is not None)
        return {
            "policy": self.policy.parameters * self.policy_bytes + (4.0 * trained if self.lora else 0.0),
            "optimizer": 2.0 * self.trained_bytes * trained / self.shards,
            "reference": self.policy.parameters * self.policy_bytes if self.reference else 0.0,
            "expert": self.expert.parameters * self.expert_bytes if self.expert is not None else 0.0,
            "vLLM": self.engine,
            "caches": float(self.rows * length * caches * self.cache_bytes),
            "gradients": self.trained_bytes * trained / self.shards,
            "activations": self._activations(length),
        }

    def _activations(self, length: int) -> float:
        model, tokens = self.policy, self.batch * length
        # Of a layer: norms, the inputs and outputs of attention and of a gated feed-forward
        layer = tokens * (8.5 * model.hidden + 4.0 * model.inner) * self.compute_bytes
        kept = layer * model.layers
        if self.checkpointing:
            kept = layer + tokens * model.hidden * model.layers * self.compute_bytes
        # Logits, their float32 copy and its gradient
        logits = self.batch * self.completion * model.vocabulary * (self.compute_bytes + 8.0)
        return kept + logits

    def peak(self) -> float:
        """Bytes at the larger of two moments: while rollouts are sampled, and in a backward pass."""
        parts = self.parts()
        standing = sum(parts[name] for name in ("policy", "optimizer", "reference", "expert"))
        awake = 0.0 if self.engine_sleeps else self.engine
        return standing + max(parts["caches"] + self.engine, parts["gradients"] + parts["activations"] + awake)

    def but(self, **changes: Any) -> "Load":
        """The same with other values."""
        return replace(self, **changes)


def room(gib: float) -> float:
    """Bytes of a device of so many GiB that a run may take."""
    return USABLE * gib * GIB - LIBRARIES


def shown(size: float) -> str:
    """
    A number of bytes for people.

    >>> shown(3 * 2**30), shown(5e6), shown(2e11)
    ('3.0 GiB', '4.8 MiB', '186 GiB')
    """
    value, unit = (size / GIB, "GiB") if size >= 0.1 * GIB else (size / 2**20, "MiB")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
