"""Sizes of what is prepared for a task."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """A phase of supervised training: AdamW, a short warm-up, then a learning rate that falls linearly to 0."""

    steps: int
    learning_rate: float
    batch_size: int = 64
    warmup_steps: int = 50


@dataclass(frozen=True)
class Settings:
    """Sizes of the data and of the models, and how long they are trained."""

    num_test_prompts: int = 256
    num_train_prompts: int = 2000
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    base: Phase = field(default_factory=lambda: Phase(steps=1200, learning_rate=5e-3))
    tuned: Phase = field(default_factory=lambda: Phase(steps=200, learning_rate=5e-4))
    samples: int = 8
