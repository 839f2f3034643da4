r"""
The gradient of LUFFY's policy shaping at the optimizer steps of a rollout batch, against autograd through f(p) A.

    python benchmarks/trajectory_shaping.py                      # a tiny model, seconds on a CPU
    python benchmarks/trajectory_shaping.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-6 1e-5 1e-4

Two ways to put the shaping into TRL's loss are compared, on the rows of trajectories alone. "trainer" is what
MentorGRPOTrainer does: weights under the policy of each step, and a ratio of 1. "sampled" is the simpler one: weights
c p_old / (p_old + c)^2 under the policy that sampled the batch, times TRL's clipped ratio p / p_old. Both are exact at
the first step. The error is ||g - g*|| / ||g*|| over all parameters, where g* is the gradient of f(p) A.

With --model, prompts and trajectories are those of --dataset (`question` and `answer` of GSM8K).
"""

import argparse
import tempfile

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer
from mentor_trl.objective import shaping_weights


CHARACTERS = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyz"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; if not set, a tiny model with random weights")
    parser.add_argument("--dataset", default="openai/gsm8k", help="Hub id or .jsonl file of the trajectories")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a rollout batch")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--constant", type=float, default=0.1)
    return parser.parse_args()


def tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, Dataset]:
    vocabulary = ["<pad>", "<eos>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), **sizes, initializer_range=0.2, pad_token_id=0, eos_token_id=1)
    questions = [f"{i}+{i + 1}=" for i in range(64)]
    rows = {"prompt": questions, "trajectory": [f"{i} and {i + 1} give {2 * i + 1}" for i in range(64)]}
    return LlamaForCausalLM(config), tokenizer, Dataset.from_dict(rows)


def real(name: str, dataset: str) -> tuple[AutoModelForCausalLM, AutoTokenizer, Dataset]:
    if dataset.endswith(".jsonl"):
        rows = load_dataset("json", data_files=dataset, split="train[:64]")
    else:
        rows = load_dataset(dataset, "main", split="train[:64]")
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name), rows.rename_column("answer", "trajectory")


class MeasuringTrainer(MentorGRPOTrainer):
    """At every step, the errors of both ways and how far the policy has moved."""

    def __init__(self, *args, **kwargs):
        self.measured: list[dict[str, float]] = []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        rows = inputs["mentor_source"] == 1
        alone = {**inputs, "advantages": torch.where(rows, inputs["advantages"], 0.0)}
        ours = self._gradient(model, super()._compute_loss(model, alone))
        part = {name: inputs[name][rows] for name in ("advantages", "old_per_token_logps", "completion_mask")}
        logps = self._logps(model, inputs, rows)
        exact = self._gradient(model, self._loss(part, logps, self._shaped))
        logps = self._logps(model, inputs, rows)
        sampled = self._gradient(model, self._loss(part, logps, self._sampled))
        log_ratio = (logps.detach() - part["old_per_token_logps"])[part["completion_mask"].bool()]
        size = exact.norm()
        self.measured.append(
            {
                "moved": log_ratio.abs().mean().item(),
                "trainer": ((ours - exact).norm() / size).item(),
                "sampled": ((sampled - exact).norm() / size).item(),
            }
        )
        return super()._compute_loss(model, inputs)

    def _logps(self, model, inputs, rows):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[rows]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[rows]
        return self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))[0]

    def _shaped(self, part, logps):
        p = logps.exp()
        return part["advantages"][:, None] * p / (p + self.args.trajectory_shaping)

    def _sampled(self, part, logps):
        old = part["old_per_token_logps"]
        weighed = part["advantages"][:, None] * shaping_weights(old, self.args.trajectory_shaping)
        ratio = (logps - old).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return torch.min(ratio * weighed, clipped * weighed)

    def _loss(self, part, logps, objective):
        """One rollout batch is one batch of the loss here, and averaged over its tokens (dapo)."""
        return -(objective(part, logps) * part["completion_mask"]).sum() / self.tokens

    def _gradient(self, model, loss):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        self.tokens = inputs["num_items_in_batch"]
        return inputs


def measure(args: argparse.Namespace, lr: float) -> list[dict[str, float]]:
    model, tokenizer, dataset = real(args.model, args.dataset) if args.model else tiny()
    config = MentorGRPOConfig(
        tempfile.mkdtemp(),
        num_mixed_generations=0,
        num_trajectory_generations=1,
        trajectory_shaping=args.constant,
        num_generations=args.generations,
        per_device_train_batch_size=args.generations,
        num_iterations=args.steps,
        max_steps=args.steps,
        max_completion_length=args.tokens,
        learning_rate=lr,
        lr_scheduler_type="constant",
        epsilon_high=0.28,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )

    def reward(completions, **kwargs):
        # The trajectory, in the last place, is right, and the policy is not
        return [float((i + 1) % args.generations == 0) for i in range(len(completions))]

    trainer = MeasuringTrainer(model, reward, config, dataset, processing_class=tokenizer)
    trainer.train()
    return trainer.measured


def main() -> None:
    args = parse_args()
    table = Table(title=f"{args.model or 'a tiny model'}: relative error of the gradient of f(p) A")
    for column in ("lr", "step", "mean |log p - log p_old|", "trainer", "sampled"):
        table.add_column(column, justify="right")
    for lr in args.lr:
        for step, values in enumerate(measure(args, lr), start=1):
            cells = [f"{values[name]:.2g}" for name in ("moved", "trainer", "sampled")]
            table.add_row(f"{lr:g}", str(step), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
