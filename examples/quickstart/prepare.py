"""
Make what the quickstart trains on: prompts, a small expert that always works a step out, and a policy that hardly ever
does. Both models come from one base that knows all ways of writing; only the choice among them is tuned apart.
"""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from examples.quickstart import task
from examples.quickstart.task import Problem, Style


if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Phase:
    """A phase of supervised training: AdamW, a short warm-up, then a learning rate that falls linearly to 0."""

    style: Style
    steps: int
    learning_rate: float
    batch_size: int = 64
    warmup_steps: int = 50


@dataclass(frozen=True)
class Settings:
    """Everything that the prepared files depend on."""

    num_test_prompts: int = 256
    num_train_prompts: int = 2000
    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    base: Phase = field(default_factory=lambda: Phase(Style(work=0.5), steps=1200, learning_rate=5e-3))
    expert: Phase = field(default_factory=lambda: Phase(Style(work=1.0), steps=250, learning_rate=5e-4))
    policy: Phase = field(default_factory=lambda: Phase(Style(work=0.01), steps=250, learning_rate=5e-4))
    seed: int = 0


def prepare(folder: Path, progress: "Progress", settings: Settings | None = None) -> None:
    """
    Write `data/` and `models/` under `folder`, or leave them alone where the same settings have written them before.

    Args:
        folder (`Path`):
            Where to write.
        progress (`Progress`):
            Shows the phases of training.
        settings (`Settings`, *optional*):
            What to write.
    """
    settings = settings or Settings()
    record = folder / "prepared.json"
    current = json.dumps({"settings": asdict(settings), "task": Path(task.__file__).read_text()}, indent=2)
    models = [folder / "models" / name for name in ("expert", "policy")]
    if record.exists() and record.read_text() == current and all(map(Path.exists, models)):
        return
    record.unlink(missing_ok=True)
    train, test = make_splits(settings)
    for name, problems in (("train", train), ("test", test)):
        write_prompts(folder / "data" / f"{name}.jsonl", problems)
    for path, model in zip(models, pretrain(settings, set(test), progress)):
        model.save_pretrained(path)
        task.build_tokenizer().save_pretrained(path)
    record.write_text(current)


def make_splits(settings: Settings) -> tuple[list[Problem], list[Problem]]:
    """Draw the problems for training and those for evaluation, which no training of any kind sees."""
    rng = random.Random(settings.seed)
    test = task.sample_distinct(rng, settings.num_test_prompts)
    return task.sample_distinct(rng, settings.num_train_prompts, exclude=set(test)), test


def write_prompts(path: Path, problems: list[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": problem.prompt, "solution": problem.solution}) for problem in problems]
    path.write_text("\n".join(rows) + "\n")


def pretrain(settings: Settings, held_out: set[Problem], progress: "Progress") -> list["LlamaForCausalLM"]:
    """Train the base; tune the expert and the policy from it, and return these two."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(task.VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=task.VOCABULARY.index(task.EOS),
        pad_token_id=task.VOCABULARY.index(task.PAD),
    )
    rng = random.Random(settings.seed)
    base = LlamaForCausalLM(config)
    fit(base, settings.base, held_out, rng, progress, "pretraining")
    expert, policy = copy.deepcopy(base), base
    fit(expert, settings.expert, held_out, rng, progress, "tuning the expert")
    fit(policy, settings.policy, held_out, rng, progress, "tuning the policy")
    return [expert, policy]


def fit(
    model: "LlamaForCausalLM",
    phase: Phase,
    held_out: set[Problem],
    rng: random.Random,
    progress: "Progress",
    name: str,
) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / phase.warmup_steps) * (1 - step / phase.steps)
    )
    texts = sample_texts(phase.style, held_out, rng)
    model.train()
    bar = progress.add_task(name, total=phase.steps, note="")
    for _ in range(phase.steps):
        ids, labels = make_batch([next(texts) for _ in range(phase.batch_size)])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.update(bar, advance=1, note=f"loss {loss.item():.2f}")
    model.eval()


def sample_texts(style: Style, held_out: set[Problem], rng: random.Random) -> Iterator[str]:
    """Draw prompts with responses in a given style, without end."""
    while True:
        problem = task.sample_problem(rng)
        if problem not in held_out:
            yield f"{problem.prompt} {task.write_response(problem, style, rng)} {task.EOS}"


def make_batch(texts: list[str]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return token ids, padded on the right, and labels that leave out the prompt and the padding."""
    import torch

    index = {word: position for position, word in enumerate(task.VOCABULARY)}
    rows = [torch.tensor([index[word] for word in text.split()]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=index[task.PAD])
    labels = ids.masked_fill(ids == index[task.PAD], -100)
    labels[:, : task.PROMPT_LENGTH] = -100
    return ids, labels
