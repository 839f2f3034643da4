"""
Show what the tasks are made for, on models that `benchmarks.study.prepare` has written: how uncertain the policy is
before the words that decide and before all others, where the entropy rule lets the expert speak, and how many
different right replies a model gives to a prompt.

```bash
python -m benchmarks.study.properties fork outputs/study/fork/seed1
```
"""

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study.prepare import sample


@torch.no_grad()
def uncertainty(module: ModuleType, model_path: Path, rows: list[dict], quantile: float = 0.95) -> dict[str, float]:
    """
    Sample a reply to each prompt and compare the entropies before its tokens.

    Args:
        module (`ModuleType`):
            The task; its `DECISIONS` are the words that decide.
        model_path (`Path`):
            Folder of the model and its tokenizer.
        rows (`list[dict]`):
            Rows with a prompt.
        quantile (`float`, *optional*, defaults to `0.95`):
            Quantile of the entropies at which the entropy rule is sure to let the expert speak.

    Returns:
        `dict`: Share of the tokens that are decisions, mean entropy (nats) of these and of the others, how often a
        decision is more uncertain than another token, and the mean weight of the entropy rule on both.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompt_length, ids = sample(model, tokenizer, [row["prompt"] for row in rows])
    real = ids != tokenizer.pad_token_id
    # Padding stands on the left of a prompt and on the right of a reply, and generation numbers the others.
    logps = model(ids, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits.log_softmax(
        -1
    )
    entropy = torch.special.entr(logps.exp()).sum(-1)[:, prompt_length - 1 : -1]
    words = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(module.DECISIONS)))
    decides = torch.isin(ids[:, prompt_length:], words)
    decides, entropy = decides[real[:, prompt_length:]], entropy[real[:, prompt_length:]]
    weight = (entropy / entropy.quantile(quantile)).clamp(max=1)
    ours, others = entropy[decides], entropy[~decides]
    return {
        "decisions": decides.float().mean().item(),
        "entropy_decisions": ours.mean().item(),
        "entropy_others": others.mean().item(),
        "more_uncertain": (ours[:, None] > others[None, :]).float().mean().item(),
        "weight_decisions": weight[decides].mean().item(),
        "weight_others": weight[~decides].mean().item(),
        "weight_share_of_decisions": (weight[decides].sum() / weight.sum()).item(),
    }


def solutions(module: ModuleType, model_path: Path, rows: list[dict], samples: int = 8) -> dict[str, float]:
    """Mean number of right replies, and of different right solutions, among `samples` replies to a prompt."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = [row for row in rows for _ in range(samples)]
    prompts = [row["prompt"] for row in rows]
    prompt_length, ids = sample(model, tokenizer, prompts)
    texts = tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)
    rewards = module.reward(prompts=prompts, completions=texts, solution=[row["solution"] for row in rows])
    right = [(p, module.describe(p, text)["solution"]) for p, text, one in zip(prompts, texts, rewards) if one == 1.0]
    count = len(rows) / samples
    return {"right": len(right) / count, "distinct": len(set(right)) / count}


def measure(task: str, folder: Path, limit: int = 256) -> dict[str, dict[str, Any]]:
    """Return the uncertainty of the policy, and the solutions of the policy and the strong experts."""
    module = importlib.import_module(f"benchmarks.study.tasks.{task}")
    rows = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()[:limit]]
    torch.manual_seed(0)
    models = {name: folder / "models" / name for name in ("policy", "expert_strong", "expert_other")}
    result = {"policy": uncertainty(module, models["policy"], rows)}
    for name, path in models.items():
        result[name] = result.get(name, {}) | solutions(module, path, rows)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="name of a module of benchmarks.study.tasks")
    parser.add_argument("folder", type=Path, help="what benchmarks.study.prepare has written")
    args = parser.parse_args()
    for name, values in measure(args.task, args.folder).items():
        print(name, *(f"{key} {value:.3f}" for key, value in values.items()), sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
