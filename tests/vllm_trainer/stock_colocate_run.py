"""
What test_stock_colocate.py launches: training with an engine of the policy in each process, and an expert at an
address. python stock_colocate_run.py FOLDER ADDRESS tensors|adapter
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig

from trainer_helpers import RecordingTrainer, letters_reward, make_trainer, prompts, weights


def main(folder: Path, url: str, sync: str) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        folder / "run",
        cls=RecordingTrainer,
        model=str(folder / "policy"),
        reward_funcs=letters_reward,
        train_dataset=prompts(64),
        trainer_kwargs={"expert": None, "peft_config": config if sync == "adapter" else None},
        expert_base_url=url,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.05,
        vllm_max_model_length=64,
        vllm_weight_sync="adapter" if sync == "adapter" else "auto",
        max_steps=3,
        expert_decay_steps=2,
        learning_rate=5e-3,
    )
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    rank = trainer.accelerator.process_index
    report = {
        "off": [
            (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[batch["completion_mask"].bool()]
            for batch in trainer.batches
        ],
        "mixed": [batch["guided"] for batch in trainer.batches],
        "branch": [
            0 if batch["rollout"] is None else batch["rollout"].branch.sum().item() for batch in trainer.batches
        ],
        "completions": [batch["completion_ids"] for batch in trainer.batches],
        "weights": weights(trainer),
        "evaluated": any("eval_reward" in entry for entry in trainer.state.log_history),
        "adapter": getattr(trainer.vllm_generation.policy.lora_request, "lora_int_id", None),
        "left": sorted(path.name for path in (folder / "run" / "_vllm_weights").glob("*")),
    }
    torch.save(report, folder / f"rank_{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
