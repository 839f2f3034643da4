"""
Make what a run of the study trains on: prompts, right replies by each expert, a policy and experts of 0.1M parameters.
The models of a seed come from one base that knows all ways of writing; only the choice among them is tuned. The task
`real` tunes its expert from a real model instead.

```bash
python -m benchmarks.study.prepare chain --seed 1 --folder outputs/study/chain/seed1
python -m benchmarks.study.prepare real --seed 1 --folder outputs/study/real/seed1 --model SmolLM2-135M-Instruct
```
"""

import argparse
import copy
import importlib
import inspect
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.study.tasks.real import ModelMissing
from benchmarks.study.tasks.sizes import Phase, Settings


MAX_NEW_TOKENS = 48


def prepare(
    task: str, seed: int, folder: str | Path, settings: Settings | None = None, model: str | None = None
) -> dict[str, Any]:
    """
    Write prompts, models and `prepared.json` under `folder`, or leave them where the same call has written them.

    `data/` has the prompts with a right reply by each expert (`trajectory_*`), and the same in `sft_*/`;
    `hints_*/` has the prompts with the first half of that reply behind them.

    Args:
        task (`str`):
            Name of a module of `benchmarks.study.tasks`.
        seed (`int`):
            Seed of the prompts and of all models.
        folder (`str` or `Path`):
            Where to write.
        settings (`Settings`, *optional*):
            Sizes; the task's own `SETTINGS` or the defaults where they are left out.
        model (`str`, *optional*):
            Of the task `real`: Hub id or folder of the model; see [`real.find_model`].

    Raises:
        [`real.ModelMissing`]: where the task needs a model that is not to be had.

    Returns:
        `dict`: What `prepared.json` holds: `pass_at_1` and `parameters` of each model, and `gold_tokens`, the number
        of tokens of the right replies by each expert.
    """
    folder = Path(folder)
    module = importlib.import_module(f"benchmarks.study.tasks.{task}")
    settings = settings or getattr(module, "SETTINGS", Settings())
    start = module.find_model(model) if hasattr(module, "find_model") else None
    source = {"task": task, "seed": seed, "settings": asdict(settings), "code": inspect.getsource(module)}
    source |= {"model": start} if start else {}
    record = folder / "prepared.json"
    if record.exists() and (prepared := json.loads(record.read_text()))["source"] == source:
        return prepared
    record.unlink(missing_ok=True)
    rng = random.Random(seed)
    tokenizer = module.build_tokenizer(start) if start else module.build_tokenizer()
    test = sample_distinct(module, rng, settings.num_test_prompts)
    train = sample_distinct(module, rng, settings.num_train_prompts, exclude=set(test))
    gold_tokens = write_data(module, tokenizer, folder, {"train": train, "test": test}, rng)
    pass_at_1, parameters = {}, {}
    for name, tuned in pretrain(module, tokenizer, settings, set(test), seed, start):
        tuned.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
        pass_at_1[name] = measure(module, tokenizer, tuned, test, settings.samples)
        parameters[name] = sum(parameter.numel() for parameter in tuned.parameters())
    prepared = {"pass_at_1": pass_at_1, "parameters": parameters, "gold_tokens": gold_tokens, "source": source}
    record.write_text(json.dumps(prepared, indent=2))
    return prepared


def experts_of(module: ModuleType) -> list[str]:
    return [style for style in module.STYLES if style not in ("base", "policy")]


def sample_distinct(module: ModuleType, rng: random.Random, count: int, exclude: set = frozenset()) -> list:
    """
    Draw `count` different problems, none of them in `exclude`.

    Raises:
        `ValueError`: where the task seems to have no more of them.
    """
    problems = {}  # a set that keeps the order
    for _ in range(100 * count):
        problem = module.sample_problem(rng)
        if problem not in exclude:
            problems[problem] = None
        if len(problems) == count:
            return list(problems)
    raise ValueError(
        f"{module.__name__} gave {len(problems)} new problems in {100 * count:,} draws; set {count} lower"
    )


def write_data(
    module: ModuleType, tokenizer: Any, folder: Path, splits: dict[str, list], rng: random.Random
) -> dict[str, int]:
    """Write the prompts with a right reply by each expert, and return how many tokens the replies to `train` have."""
    gold_tokens = {}
    joint = getattr(module, "JOINT", " ")  # without a space the prompt's last word and the reply's first would be one
    for split, problems in splits.items():
        rows = [{"prompt": problem.prompt, "solution": problem.solution} for problem in problems]
        for name in experts_of(module):
            replies = [right_reply(module, problem, name, rng) for problem in problems]
            pairs = [{"prompt": row["prompt"], "completion": joint + reply} for row, reply in zip(rows, replies)]
            hints = [row["prompt"] + joint + first_half(reply) for row, reply in zip(rows, replies)]
            write_lines(folder / f"hints_{name}" / f"{split}.jsonl", with_prompts(rows, hints))
            if split == "train":
                write_lines(folder / f"sft_{name}" / "train.jsonl", pairs)
                gold_tokens[name] = sum(len(ids) + 1 for ids in tokenizer(replies).input_ids)
            for row, reply in zip(rows, replies):
                row[f"trajectory_{name}"] = reply
        write_lines(folder / "data" / f"{split}.jsonl", rows)
    return gold_tokens


def with_prompts(rows: list[dict[str, str]], prompts: list[str]) -> list[dict[str, str]]:
    return [row | {"prompt": prompt} for row, prompt in zip(rows, prompts)]


def first_half(reply: str) -> str:
    """
    >>> first_half("work 4 +7 = 1")
    'work 4'
    """
    words = reply.split()
    return " ".join(words[: len(words) // 2])


def right_reply(module: ModuleType, problem: Any, expert: str, rng: random.Random) -> str:
    """Write replies in an expert's style until one is right."""
    while True:
        reply = module.write_response(problem, module.STYLES[expert], rng)
        if module.reward(prompts=[problem.prompt], completions=[reply], solution=[problem.solution]) == [1.0]:
            return reply


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrain(
    module: ModuleType, tokenizer: Any, settings: Settings, held_out: set, seed: int, start: str | None
) -> Iterator[tuple[str, PreTrainedModel]]:
    """
    Train the base, or load it from `start`; tune the policy and the experts from it, and yield these with their names.
    A policy that has no style is the base itself.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    if start:
        base = module.load_model(start, tokenizer)
    else:
        base = LlamaForCausalLM(make_config(tokenizer, settings))
        fit(module, tokenizer, base, "base", settings.base, held_out, rng)
    for name, style in [("policy", "policy"), *((f"expert_{style}", style) for style in experts_of(module))]:
        model = copy.deepcopy(base)
        if style in module.STYLES:
            fit(module, tokenizer, model, style, settings.tuned, held_out, rng)
        yield name, model


def make_config(tokenizer: Any, settings: Settings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fit(
    module: ModuleType,
    tokenizer: Any,
    model: PreTrainedModel,
    style: str,
    phase: Phase,
    held_out: set,
    rng: random.Random,
) -> None:
    """Train a model on responses in a style."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / phase.warmup_steps) * (1 - step / phase.steps)
    )
    examples = sample_examples(module, style, held_out, rng)
    model.train()
    for _ in range(phase.steps):
        batch = make_batch(tokenizer, [next(examples) for _ in range(phase.batch_size)])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()


def sample_examples(module: ModuleType, style: str, held_out: set, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Draw prompts with responses in a given style, without end."""
    while True:
        problem = module.sample_problem(rng)
        if problem not in held_out:
            yield problem.prompt, module.write_response(problem, module.STYLES[style], rng)


def make_batch(tokenizer: Any, examples: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return token ids, padded on the right, and labels that leave out the prompt and the padding."""
    prompts, responses = (tokenizer(list(texts)).input_ids for texts in zip(*examples))
    rows = [prompt + response + [tokenizer.eos_token_id] for prompt, response in zip(prompts, responses)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for position, (row, prompt) in enumerate(zip(rows, prompts)):
        ids[position, : len(row)] = torch.tensor(row)
        labels[position, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
        mask[position, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def measure(module: ModuleType, tokenizer: Any, model: PreTrainedModel, problems: list, samples: int) -> float:
    """Share of right responses among `samples` to each problem, at temperature 1."""
    problems = [problem for problem in problems for _ in range(samples)]
    prompts = [problem.prompt for problem in problems]
    prompt_length, ids = sample(model, tokenizer, prompts)
    texts = tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)
    rewards = module.reward(prompts=prompts, completions=texts, solution=[problem.solution for problem in problems])
    return sum(one >= 1 for one in rewards) / len(rewards)


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: Any, prompts: list[str]) -> tuple[int, torch.Tensor]:
    """Sample a response to each prompt; return the length of the padded prompts, and these with their responses."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    return inputs["input_ids"].shape[1], model.generate(**inputs, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="name of a module of benchmarks.study.tasks")
    parser.add_argument("--seed", type=int, default=1, help="seed of the prompts and of all models")
    parser.add_argument("--folder", type=Path, required=True, help="where to write")
    parser.add_argument("--model", help="Hub id or folder of the model of the task `real`")
    args = parser.parse_args()
    try:
        prepared = prepare(args.task, args.seed, args.folder, model=args.model)
    except ModelMissing as missing:
        print(f"Skipped: {missing}")
        return 0
    print(json.dumps({name: prepared[name] for name in ("pass_at_1", "parameters", "gold_tokens")}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
