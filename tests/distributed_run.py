"""What test_trainer_distributed.py launches on two processes: python -m torch.distributed.run ... FOLDER."""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset

from helpers import make_tiny_model
from mentor_trl.connection.failures import ServerError
from mentor_trl.rollout.serving import generation
from served_helpers import make_served_trainer, stand_in
from trainer_helpers import RecordingTrainer, history, letters_reward, make_trainer, prompts, weights


CASES = {
    # A group over both processes: the first has on-policy rows only, the second mixed rows only
    "split_4_4": {"per_device_train_batch_size": 4},
    # The second process has mixed rows only
    "split_3_5": {"per_device_train_batch_size": 4, "num_mixed_generations": 5, "gradient_accumulation_steps": 2},
    # Whole groups on each process, and one that lies across
    "across": {"per_device_train_batch_size": 9, "num_generations": 6, "num_mixed_generations": 2},
    "undefined_rewards": {"per_device_train_batch_size": 8, "scale_rewards": "batch"},
    "mixture": {
        "per_device_train_batch_size": 4,
        "correction_level": "mixture",
        "beta": 0.02,
        "expert_decay_steps": 2,
    },
}
# The same splits with a server, to which the main process alone speaks
SERVED = {f"served_{name}": CASES[name] for name in ("split_4_4", "split_3_5", "across")}
# Rows of different length on the two processes
SERVED["served_uneven"] = {"per_device_train_batch_size": 8, "max_completion_length": 400, "max_steps": 1}
SERVED["served_by_two"] = {**CASES["split_4_4"], "vllm_policy_server_base_url": "http://policy:8000"}
# Trajectories in groups that lie across, of which every third prompt has none
TRAJECTORIES = {"per_device_train_batch_size": 9, "num_generations": 6, "num_mixed_generations": 0}
TRAJECTORIES |= {"num_trajectory_generations": 2, "num_iterations": 2, "max_steps": 4, "max_completion_length": 12}
# Half of the prompts have one reward
RESAMPLED = {"per_device_train_batch_size": 8, "num_generations": 4, "num_mixed_generations": 2, "max_steps": 3}
RESAMPLED |= {"dynamic_sampling": 3, "max_completion_length": 12}
# Four groups; guidance is withdrawn behind the second batch, and every second batch after that is a probe
FAILING = {"per_device_train_batch_size": 16, "guide_prompts": "failing", "guide_below": 0.6, "max_steps": 5}
FAILING |= {"alpha_schedule": "adaptive", "guidance_margin": 9.0, "guidance_patience": 2, "guidance_probe_every": 2}
# Distillation in groups that lie across
DISTILLED = {
    "gats": {"num_mixed_generations": 2, "distillation": "gats", "gats_reference": 2.0},
    "full": {"num_mixed_generations": 0, "distillation": "opd", "distillation_loss": "full"},
    "distilled_rl": {"num_mixed_generations": 0, "distillation": "distilled_rl"},
}
RESUME = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 7}
RESUME |= {"save_strategy": "steps", "save_steps": 6, "train_dataset": prompts(2), "logging_steps": 4}


def partly(completions, prompts, **kwargs):
    """The first process has no defined reward for its last rows."""
    rewards = letters_reward(completions)
    rank = torch.distributed.get_rank()
    return [None if rank == 0 and i in (0, 7) else reward for i, reward in enumerate(rewards)]


def problems() -> Dataset:
    return prompts(12).add_column("trajectory", [f"so {2 * i}" if i % 3 else None for i in range(12)])


def report(trainer) -> dict:
    batches = [
        {
            name: batch[name]
            for name in (
                "advantages",
                "guided",
                "rewards",
                "row_advantages",
                "alpha",
                "gamma",
                "completion_mask",
            )
        }
        for batch in trainer.batches
    ]
    return {
        "batches": batches,
        "history": history(trainer),
        "weights": weights(trainer),
        "guidance": trainer.algorithm.guidance.state_dict(),
        "seeds": [trainer.algorithm.seed(source) for source in (0, 1)],
    }


def train_with_trajectories(folder: Path) -> dict:
    settings = {**TRAJECTORIES, "model": str(folder / "policy"), "train_dataset": problems()}
    trainer = make_trainer(folder / "trajectories", cls=RecordingTrainer, **settings)
    trainer.train()
    decode = trainer.processing_class.batch_decode
    batches = [
        {
            "trajectory": batch["guided"],
            "prompts": decode(batch["prompt_ids"], skip_special_tokens=True),
            "completions": decode(batch["completion_ids"], skip_special_tokens=True),
        }
        for batch in trainer.batches
    ]
    return {"batches": batches, "weights": weights(trainer), "history": history(trainer)}


def half_reward(prompts, completions, **kwargs) -> list[float]:
    return [sum(map(ord, c)) % 101 / 101 * (int(p.split("+")[0]) % 2) for p, c in zip(prompts, completions)]


def train_resampled(folder: Path) -> dict:
    settings = {**RESAMPLED, "model": str(folder / "policy"), "reward_funcs": half_reward, "log_completions": True}
    trainer = make_trainer(folder / "resampled", cls=RecordingTrainer, **settings)
    trainer.train()
    decode = trainer.processing_class.batch_decode
    names = ("prompt_ids", "completion_ids")
    batches = [
        {name: decode(batch[name], skip_special_tokens=True) for name in names}
        | {name: batch[name] for name in ("completion_mask", "num_items_in_batch", "row_advantages")}
        for batch in trainer.batches
    ]
    state = {"drawn": trainer.resampling.drawn, "guidance": trainer.algorithm.guidance.state_dict()}
    return {"batches": batches, "weights": weights(trainer), "history": history(trainer), **state}


def train_on_failing(folder: Path) -> dict:
    """In process, and with servers of policy and expert, and of the policy."""
    reports = {}
    settings = {**FAILING, "model": str(folder / "policy")}
    for name, servers in (
        ("failing", None),
        ("served_failing", {"vllm_policy_server_base_url": "http://policy:8000"}),
    ):
        with nullcontext() if servers is None else stand_in():
            make = partial(make_trainer, cls=RecordingTrainer) if servers is None else make_served_trainer
            trainer = make(folder / name, **settings, **(servers or {}))
            trainer.train()
        reports[name] = report(trainer)
        for kept, batch in zip(reports[name]["batches"], trainer.batches):
            kept["lengths"] = batch["completion_mask"].sum(1)
    return reports


def train_with_scores(folder: Path, name: str) -> dict:
    settings = {"per_device_train_batch_size": 9, "num_generations": 6, "max_completion_length": 12, "max_steps": 3}
    settings |= {"model": str(folder / "policy"), **DISTILLED[name]}
    trainer = make_trainer(folder / f"distilled_{name}", cls=RecordingTrainer, **settings)
    kept, log_metrics = [], trainer._log_metrics
    trainer._log_metrics = lambda metrics: (kept.append(metrics), log_metrics(metrics))
    trainer.train()
    batches = [{name: batch[name] for name in ("completion_mask", "rewards")} for batch in trainer.batches]
    return {"weights": weights(trainer), "state": trainer.algorithm.state_dict(), "batches": batches, "metrics": kept}


def failing_push(folder: Path) -> str:
    """The error of a run of sharded weights that the main process cannot write."""
    params, write = generation.PolicyGeneration._iter_named_params, generation.write_weights

    def sharded(self):
        for name, param in params(self):
            torch.distributed.barrier()
            yield name, param

    def full(*args):
        raise OSError("No space left")

    generation.PolicyGeneration._iter_named_params, generation.write_weights = sharded, full
    try:
        with stand_in():
            make_served_trainer(folder / "unsent", max_steps=1, model=str(folder / "policy")).train()
    except (OSError, RuntimeError) as error:
        return str(error)
    finally:
        generation.PolicyGeneration._iter_named_params, generation.write_weights = params, write


def main(folder: Path) -> None:
    make_tiny_model(seed=0).save_pretrained(folder / "policy")  # by the main process alone
    torch.distributed.barrier()
    reports = {}
    for name, settings in CASES.items():
        settings = {"max_steps": 3, "model": str(folder / "policy"), **settings}
        if name == "undefined_rewards":
            settings["reward_funcs"] = partly
        # Metrics are logged by the main process alone, so each process keeps its own
        kept = []
        trainer = make_trainer(folder / name, cls=RecordingTrainer, **settings)
        log_metrics = trainer._log_metrics
        trainer._log_metrics = lambda metrics, kept=kept, log=log_metrics: (kept.append(metrics), log(metrics))
        trainer.train()
        reports[name] = {**report(trainer), "metrics": kept}
    reports |= train_on_failing(folder)
    reports["trajectories"] = train_with_trajectories(folder)
    reports["resampled"] = train_resampled(folder)
    reports["distilled"] = {name: train_with_scores(folder, name) for name in DISTILLED}
    for name, settings in SERVED.items():
        settings = {"max_steps": 3, "model": str(folder / "policy"), **settings}
        with stand_in() as servers:
            trainer = make_served_trainer(folder / name, **settings)
            trainer.train()
        reports[name] = {**report(trainer), "servers": len(servers)}
        reports[name]["off"] = [
            (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[batch["completion_mask"].bool()]
            for batch in trainer.batches
        ]
        reports[name]["branch"] = [batch["rollout"].branch.sum().item() for batch in trainer.batches]
    with stand_in({5: ServerError}):  # in the third batch, on the main process
        trainer = make_served_trainer(folder / "broken", max_steps=3, model=str(folder / "policy"))
        try:
            trainer.train()
        except ServerError as error:
            reports["broken"] = str(error)
    reports["unsent"] = failing_push(folder)
    whole = make_trainer(folder / "whole", cls=RecordingTrainer, **RESUME)
    whole.train()
    reports["whole"] = report(whole)
    resumed = make_trainer(folder / "resumed", cls=RecordingTrainer, **RESUME)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    reports["resumed"] = report(resumed)
    torch.save(reports, folder / f"rank_{torch.distributed.get_rank()}.pt")


def restore_on_cpu(storage, location: str):
    return storage if location.startswith("cpu:") else None


if __name__ == "__main__":
    # The Trainer reads the optimizer of a checkpoint to the process's device, which on the CPU is called cpu:1, and
    # torch.load does not know that name.
    torch.serialization.register_package(11, lambda storage: None, restore_on_cpu)
    torch.distributed.init_process_group("gloo")
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
