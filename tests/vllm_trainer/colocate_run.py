"""What test_colocate_training.py launches: training with an engine in each process. python colocate_run.py FOLDER"""

import sys
from pathlib import Path

import torch

from trainer_helpers import RecordingTrainer, letters_reward, make_trainer, prompts, weights


def expert_digest(trainer) -> str:
    return trainer.vllm_generation.sampler.llm.collective_rpc("mentor_digest", args=("expert",))[0]


def main(folder: Path) -> None:
    # The engine takes its memory as a share of the machine's, which is less than tiny models need of a small one
    trainer = make_trainer(
        folder / "run",
        cls=RecordingTrainer,
        model=str(folder / "policy"),
        reward_funcs=letters_reward,
        train_dataset=prompts(64),
        trainer_kwargs={"expert": None},
        expert_model_name_or_path=str(folder / "expert"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.05,
        vllm_max_model_length=64,
        max_steps=3,
        expert_decay_steps=2,
        draft_length=4,
        learning_rate=5e-3,
    )
    before = expert_digest(trainer)
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    trainer.vllm_generation.sync_weights()
    rank = trainer.accelerator.process_index
    report = {
        "before": before,
        "after": expert_digest(trainer),
        "off": [
            (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[batch["completion_mask"].bool()]
            for batch in trainer.batches
        ],
        "mixed": [batch["guided"] for batch in trainer.batches],
        "branch": [
            0 if batch["rollout"] is None else batch["rollout"].branch.sum().item() for batch in trainer.batches
        ],
        "weights": weights(trainer),
        "version": trainer.vllm_generation.sampler.llm.collective_rpc("mentor_info")[0]["weights_version"],
        "evaluated": any("eval_reward" in entry for entry in trainer.state.log_history),
    }
    torch.save(report, folder / f"rank_{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
