"""
Short runs of tiny models, by name. What must agree with what is declared in test_invariant.py.

    PYTHONPATH=.:tests python tests/invariant/invariant_runs.py

writes the numbers of the first run of each class to references.json. Do so only where numbers are meant to change, and
say in the commit why they do.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from trl import GRPOConfig, GRPOTrainer

import served_helpers
from helpers import make_tiny_model
from mentor_trl import MentorGRPOTrainer
from mentor_trl.rollout import MixedRollout
from served_helpers import StandIn, make_served_trainer, stand_in
from trainer_helpers import history, make_trainer, prompts, weights


REFERENCES = Path(__file__).parent / "references.json"
# Means over the steps since the start of the process, and the work of an engine rather than its rows
SKIPPED = ("train_loss", "mentor/tokens_per_round", "mentor/expert_calls_avoided")


class Trajectory(NamedTuple):
    log: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


# Settings


PLAIN = {"gradient_accumulation_steps": 2, "max_steps": 3}
OFF_POLICY = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.02, "gradient_checkpointing": True}
OFF_POLICY["max_steps"] = 4
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "log_completions": True, "max_steps": 2}
EVALUATED |= {"trainer_kwargs": {"eval_dataset": prompts(2)}}
MENTOR = {"gradient_accumulation_steps": 2, "expert_decay_steps": 6, "max_steps": 4}
MIXTURE = {**OFF_POLICY, "correction_level": "mixture", "expert_decay_steps": 3, "max_steps": 7}
LUFFY = {"num_mixed_generations": 0, "num_trajectory_generations": 2, "steps_per_generation": 2, "max_steps": 4}
LUFFY["train_dataset"] = prompts().add_column("trajectory", [f"so {2 * i}" if i % 3 else None for i in range(40)])
LORA = {"gradient_accumulation_steps": 2, "max_steps": 4}
# Adam would make steps of the usual size from the rounding of gradients that are zero
GIVEN = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
WHOLE = {**GIVEN, "per_device_train_batch_size": 16}
PARTS = {**GIVEN, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
HALF = {**GIVEN, "per_device_train_batch_size": 8}
QUARTER = {**GIVEN, "per_device_train_batch_size": 4}


# Completions that are given: functions of prompt, place in the group and step, so that any split of a batch has them


def given_row(*key) -> tuple[random.Random, list[int]]:
    draw = random.Random(repr(key))
    ids = [draw.randrange(7, 64) for _ in range(draw.randrange(3, 9))]
    return draw, ids if len(ids) == 8 else [*ids, 2]


def places(rows: list) -> list[int]:
    return [rows[:i].count(row) for i, row in enumerate(rows)]


def given_completions(prompts: list[str], trainer) -> dict[str, list]:
    ids = [given_row(p, i, trainer.state.global_step)[1] for p, i in zip(prompts, places(prompts))]
    logps = [[-4.0] * len(row) for row in ids]
    return {"prompt_ids": trainer.processing_class(prompts)["input_ids"], "completion_ids": ids, "logprobs": logps}


class GivenRows(StandIn):
    """A server that says rows and records by heart."""

    def sample(self, request, progress=None) -> MixedRollout:
        drawn = [
            given_row(prompt, place, gamma == float("inf"), len(self.versions))
            for prompt, place, gamma in zip(request.prompt_ids, places(request.prompt_ids), request.gamma)
        ]
        length = max((len(ids) for _, ids in drawn), default=0)
        record = lambda low, high: torch.tensor(
            [[draw.uniform(low, high) if t < len(ids) else torch.nan for t in range(length)] for draw, ids in drawn]
        ).view(len(drawn), length)
        gamma = torch.tensor(request.gamma)[:, None]
        entropies, logps, expert_logps, coin = record(1, 4), record(-6, -1), record(-6, -1), record(0, 1)
        branch = (coin < 0.5) & gamma.isfinite()
        weight = (entropies / gamma).clamp(max=1.0)
        mixed = ((1 - weight) * logps.exp() + weight * expert_logps.exp()).log()
        return MixedRollout(
            completion_ids=[ids for _, ids in drawn],
            entropies=entropies,
            weights=weight,
            logps=logps,
            expert_logps=expert_logps.where(branch, torch.nan),
            mixed_logps=mixed.where(branch, torch.nan),
            branch=branch,
            replaced=branch & (coin < 0.25),
            stats={"tokens": sum(len(ids) for _, ids in drawn), "seconds": 1.0},
        )


# Runs


def train(trainer, resume_from: Path | None = None) -> Trajectory:
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return Trajectory(history(trainer, without=SKIPPED), weights(trainer))


def make(folder: Path, settings: dict, **kwargs):
    """A trainer whose policy lies in a folder, where TRL's reference model comes from."""
    make_tiny_model(seed=0).save_pretrained(folder / "policy")
    return make_trainer(folder, **{"cls": MentorGRPOTrainer, "model": str(folder / "policy"), **kwargs, **settings})


def by_trl(folder: Path, settings: dict) -> Trajectory:
    return train(make(folder, settings, cls=GRPOTrainer, config=GRPOConfig))


def straight(folder: Path, settings: dict, **more) -> Trajectory:
    return train(make(folder, {**settings, **more}))


def resumed(folder: Path, settings: dict, step: int) -> Trajectory:
    """Cut at a step, and gone on with by another trainer."""
    settings = {**settings, "save_strategy": "steps", "save_steps": step}
    straight(folder / "cut", settings)
    return train(make(folder / "on", settings), folder / "cut" / f"checkpoint-{step}")


def served(folder: Path, settings: dict, server: type[StandIn] = StandIn) -> Trajectory:
    with stand_in():
        served_helpers.generation.ServerSampler = server
        return train(make_served_trainer(folder, cls=MentorGRPOTrainer, **settings))


def by_heart(folder: Path, settings: dict) -> Trajectory:
    settings = {"vllm_importance_sampling_mode": "token_truncate", **settings}
    return served(folder, settings, server=GivenRows)


def given(folder: Path, settings: dict, cls=MentorGRPOTrainer, config=None) -> Trajectory:
    settings = {"trainer_kwargs": {"rollout_func": given_completions}, **settings}
    settings |= {"config": config} if config else {"num_mixed_generations": 0}
    return train(make_trainer(folder, cls=cls, **settings))


def with_adapter(folder: Path, settings: dict, step: int | None = None, reload: bool = False) -> Trajectory:
    """Low-rank adapters, cut at a step, and gone on with in a new adapter or in the one that was saved."""

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    settings = {"trainer_kwargs": {"peft_config": config}, **settings}
    if step is None:
        return straight(folder, settings)
    settings |= {"save_strategy": "steps", "save_steps": step}
    straight(folder / "cut", settings)
    checkpoint = folder / "cut" / f"checkpoint-{step}"
    if reload:
        settings["model"] = PeftModel.from_pretrained(make_tiny_model(seed=0), checkpoint, is_trainable=True)
        settings["trainer_kwargs"] = {}
    return train(make(folder / "on", settings), checkpoint)


RUNS = {
    "trl": partial(by_trl, settings=PLAIN),
    "no mixed rows": partial(straight, settings=PLAIN, num_mixed_generations=0),
    "alpha 0": partial(straight, settings=PLAIN, alpha=0.0),
    "trl, off-policy": partial(by_trl, settings=OFF_POLICY),
    "no mixed rows, off-policy": partial(straight, settings=OFF_POLICY, num_mixed_generations=0),
    "alpha 0, off-policy": partial(straight, settings=OFF_POLICY, alpha=0.0),
    "trl, evaluated": partial(by_trl, settings=EVALUATED),
    "no mixed rows, evaluated": partial(straight, settings=EVALUATED, num_mixed_generations=0),
    "alpha 0, evaluated": partial(straight, settings=EVALUATED, alpha=0.0),
    "mentor": partial(straight, settings=MENTOR),
    "mentor, resumed": partial(resumed, settings=MENTOR, step=2),
    "mentor, served": partial(served, settings={**MENTOR, "vllm_importance_sampling_correction": False}),
    "mixture": partial(straight, settings=MIXTURE),
    "mixture, resumed within a batch": partial(resumed, settings=MIXTURE, step=5),
    "luffy": partial(straight, settings=LUFFY),
    "luffy, resumed within a batch": partial(resumed, settings=LUFFY, step=3),
    "lora": partial(with_adapter, settings=LORA),
    "lora, resumed": partial(with_adapter, settings=LORA, step=2),
    "lora, reloaded": partial(with_adapter, settings=LORA, step=2, reload=True),
    "trl, given rows": partial(given, settings=WHOLE, cls=GRPOTrainer, config=GRPOConfig),
    "given rows": partial(given, settings=WHOLE),
    "given rows, accumulated": partial(given, settings=PARTS),
    "given rows, 2 processes": partial(given, settings=HALF),
    "given mixed rows": partial(by_heart, settings=WHOLE),
    "given mixed rows, accumulated": partial(by_heart, settings=PARTS),
    "given mixed rows, 2 processes": partial(by_heart, settings=HALF),
    "given mixed rows, groups across 2 processes": partial(by_heart, settings=QUARTER),
    "given mixed rows, one group": partial(by_heart, settings=HALF),
}


def run(name: str, folder: Path) -> Trajectory:
    return RUNS[name](folder=folder)


def run_on_two_processes(names: list[str], folder: Path) -> dict[str, Trajectory]:
    """The runs as the main process saw them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), __file__, str(folder), *names]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {name: Trajectory(*torch.load(folder / f"{i}.pt", weights_only=True)) for i, name in enumerate(names)}


def run_as_one_of_two(folder: Path, names: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    for i, name in enumerate(names):
        trajectory = run(name, folder / str(i))
        if torch.distributed.get_rank() == 0:
            torch.save(tuple(trajectory), folder / f"{i}.pt")
    torch.distributed.destroy_process_group()


def record(classes, stored_names: tuple[str, ...]) -> None:
    references = {}
    for equal in classes:
        with tempfile.TemporaryDirectory() as folder:
            references[equal.first] = stored(run(equal.first, Path(folder)), stored_names)
    REFERENCES.write_text(json.dumps(references, indent=1) + "\n")


def stored(trajectory: Trajectory, names: tuple[str, ...]) -> list[dict[str, float]]:
    return [{name: entry[name] for name in names if name in entry} for entry in trajectory.log if "loss" in entry]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_as_one_of_two(Path(sys.argv[1]), sys.argv[2:])
    else:
        from test_invariant import CLASSES, STORED

        record(CLASSES, STORED)
