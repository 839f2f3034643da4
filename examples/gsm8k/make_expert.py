"""
Make the expert of the GSM8K recipes: supervised fine-tuning on GSM8K's worked solutions, with TRL's `SFTTrainer`.

Each solution becomes `<think>solution</think>` and a boxed answer under MENTOR's system prompt, which is the format
that the recipes reward. The expert must have the tokens of the policy: take a model of the same family.

```bash
python examples/gsm8k/make_expert.py --output_dir experts/SmolLM2-360M-gsm8k
python examples/gsm8k/make_expert.py --output_dir experts/tiny --dataset_name gsm8k_train.jsonl --max_steps 10
```
"""

import argparse
import re

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from mentor_trl.data import build_prompt_dataset, load_dataset_dict, select_split


def make_completion(row: dict) -> dict:
    """Turn a worked solution into the response that the rewards ask for."""
    reasoning = row["answer"].rpartition("####")[0].strip()
    reasoning = re.sub(r"<<.*?>>", "", reasoning)  # the calculator annotations of GSM8K
    response = f"<think>\n{reasoning}\n</think>\nThe answer is \\boxed{{{row['solution']}}}."
    return {"completion": [{"role": "assistant", "content": response}]}


def load_rows(dataset_name: str, dataset_config: str | None, max_samples: int | None) -> Dataset:
    """Rows with the columns `prompt` and `completion`, as `SFTTrainer` takes them."""
    rows = build_prompt_dataset(
        select_split(load_dataset_dict(dataset_name, dataset_config), "train", "dataset_name"),
        prompt_column="question",
        solution_column="answer",
        solution_delimiter="####",
        system_prompt="mentor",
        max_samples=max_samples,
        name=dataset_name,
    )
    return rows.map(make_completion).select_columns(["prompt", "completion"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-360M-Instruct")
    parser.add_argument("--output_dir", required=True, help="folder of the expert")
    parser.add_argument("--dataset_name", default="openai/gsm8k", help="Hub id, or a file with question and answer")
    parser.add_argument("--dataset_config", default="main", help="used for a Hub id only")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after this many steps")
    parser.add_argument("--max_samples", type=int, help="number of rows to use, from the first one")
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    args = parser.parse_args()

    training_args = SFTConfig(
        output_dir=args.output_dir,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        logging_steps=10,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    rows = load_rows(args.dataset_name, args.dataset_config, args.max_samples)
    trainer = SFTTrainer(model=args.model_name_or_path, args=training_args, train_dataset=rows)
    trainer.train()
    trainer.save_model(args.output_dir)
    print(f"Expert saved to {args.output_dir}.")


if __name__ == "__main__":
    main()
