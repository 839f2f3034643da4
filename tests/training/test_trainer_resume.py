"""A run that is cut and resumed gives the numbers of a run that was not."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trainer_helpers import history, letters_reward, make_trainer, prompts, same_weights, weights


# HF's Trainer keeps the loss since the last log in memory only, so a resumed run divides a shorter sum by the whole
# window in the first log behind a checkpoint inside a logging window; the mean loss of the run has the same cause.
LOSS = ("loss", "train_loss")


def run(folder, resume=None, **settings):
    trainer = make_trainer(folder, save_strategy="steps", **settings)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


# Withdrawn behind the third rollout batch, and a probe in every second batch after that
ADAPTIVE = {"alpha_schedule": "adaptive", "guidance_margin": 9.0, "guidance_patience": 2, "guidance_probe_every": 2}
OFF_POLICY = {"steps_per_generation": 2, "num_iterations": 2, "expert_decay_steps": 4}
CASES = {
    # rollout batches of one optimizer step
    "end_of_batch": (2, {"gradient_accumulation_steps": 2, "max_steps": 4, "expert_decay_steps": 3}),
    # rollout batches of four optimizer steps, in the first slice of the second pass over the second batch
    "mid_batch": (6, {**OFF_POLICY, "max_steps": 10}),
    "mid_batch_accumulating": (
        1,
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "num_generations": 4}
        | {"num_mixed_generations": 2, "per_device_train_batch_size": 4},
    ),
    # two prompts a batch and six prompts: an epoch has twelve optimizer steps
    "second_epoch": (15, {**OFF_POLICY, "max_steps": 18, "train_dataset": prompts(6), "expert_decay_steps": 9}),
    # four prompts: eight
    "third_epoch_begins": (16, {**OFF_POLICY, "max_steps": 19, "train_dataset": prompts(4), "expert_decay_steps": 9}),
    "after_the_decay": (6, {**OFF_POLICY, "max_steps": 8, "expert_decay_steps": 1}),
    "logging_window": (4, {**OFF_POLICY, "max_steps": 9, "logging_steps": 3, "log_completions": True}),
    "all_mixed": (2, {"max_steps": 4, "num_mixed_generations": 8, "entropy_threshold_from": "previous"}),
    "plain": (3, {**OFF_POLICY, "max_steps": 6, "num_mixed_generations": 0}),
    # inside the fourth batch, and inside the fifth, a probe
    "withdrawn": (13, {**OFF_POLICY, **ADAPTIVE, "max_steps": 18}),
    "probe": (18, {**OFF_POLICY, **ADAPTIVE, "max_steps": 21}),
    "failing": (
        5,
        {**OFF_POLICY, "alpha_schedule": "adaptive", "guide_prompts": "failing", "max_steps": 12, "num_generations": 4}
        | {"num_mixed_generations": 2, "log_completions": True},
    ),
    "two_rewards": (
        2,
        {"gradient_accumulation_steps": 2, "max_steps": 4, "log_completions": True}
        | {
            "reward_funcs": [letters_reward, lambda completion_ids, **kwargs: [len(ids) / 8 for ids in completion_ids]]
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resuming_repeats_the_run(case, tmp_path):
    k, settings = CASES[case]
    settings = {"max_completion_length": 6, "save_steps": k, "save_total_limit": None, **settings}
    whole = run(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{k}", tmp_path / f"checkpoint-{k}")
    resumed = run(tmp_path / "resumed", resume=tmp_path / f"checkpoint-{k}", **settings)
    skip = (*LOSS, "grad_norm") if settings.get("logging_steps", 1) > 1 else ("train_loss",)
    assert history(resumed, skip) == history(whole, skip)
    assert same_weights(weights(resumed), weights(whole))
    assert resumed.algorithm.state_dict() == whole.algorithm.state_dict()
    if settings.get("log_completions"):
        for table in (tmp_path / "whole" / "completions").iterdir():
            if int(table.stem[-5:]) > k:
                assert table.read_bytes() == (tmp_path / "resumed" / "completions" / table.name).read_bytes()


def test_the_guidance_is_restored(tmp_path):
    settings = {"max_steps": 3, "save_steps": 2, "expert_decay_steps": 9}
    first = run(tmp_path / "a", **settings)
    saved = torch.load(tmp_path / "a" / "checkpoint-2" / "mentor_state_0.pt", weights_only=True)
    assert saved["algorithm"]["batches"] == 2 and saved["algorithm"]["gamma"] > 0.1
    resumed, seen = make_trainer(tmp_path / "b", **settings), []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append((resumed.algorithm.guidance.state_dict(), resumed.algorithm.guidance.alpha))

    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert seen == [(saved["algorithm"], first.state.log_history[2]["mentor/alpha"])]
    assert seen[0][1] < 1.0


def test_extra_columns_of_any_kind_survive(tmp_path):
    def reward(completions, log_extra, log_metric, **kwargs):
        rewards = letters_reward(completions)
        log_extra("score", [np.float32(r) for r in rewards])
        log_extra("answer", [{"parsed": str(r)} for r in rewards])
        log_metric("share", np.float64(np.mean(rewards)))
        return rewards

    settings = {"reward_funcs": reward, "max_steps": 4, "save_steps": 3, "logging_steps": 2, "log_completions": True}
    whole = run(tmp_path / "a", **settings)
    resumed = run(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-3", **settings)
    assert history(resumed, (*LOSS, "grad_norm")) == history(whole, (*LOSS, "grad_norm"))
    assert same_weights(weights(resumed), weights(whole))


def test_a_stream_resumes(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"prompt": f"{i}+{i}="} for i in range(40)))
    settings = {"train_dataset": stream, "max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = run(tmp_path / "a", **settings)
    resumed = run(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-2", **settings)
    assert history(resumed, ("train_loss",)) == history(whole, ("train_loss",))
    assert same_weights(weights(resumed), weights(whole))


def test_a_checkpoint_of_trl_resumes_with_a_warning(tmp_path):
    settings = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    make_trainer(tmp_path / "a", cls=GRPOTrainer, config=GRPOConfig, **settings).train()
    trainer = make_trainer(tmp_path / "b", **settings)
    with pytest.warns(UserWarning, match=r"no mentor_state_0.pt.*alpha and gamma start anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert trainer.algorithm.guidance.batches == 1


def test_trl_resumes_our_checkpoint(tmp_path):
    run(tmp_path / "a", max_steps=2, save_steps=1)
    trainer = make_trainer(tmp_path / "b", cls=GRPOTrainer, config=GRPOConfig, max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("in_the_middle", [True, False])
def test_another_number_of_processes(in_the_middle, tmp_path):
    settings = {"max_steps": 3, "save_steps": 1 if in_the_middle else 2, "steps_per_generation": 2}
    run(tmp_path / "a", **settings)
    checkpoint = tmp_path / "a" / f"checkpoint-{settings['save_steps']}"
    state = torch.load(checkpoint / "mentor_state_0.pt", weights_only=True)
    assert (state["buffered_inputs"] is not None) is in_the_middle
    torch.save({**state, "num_processes": 2}, checkpoint / "mentor_state_0.pt")
    trainer = make_trainer(tmp_path / "b", **settings)
    if in_the_middle:
        with pytest.raises(ValueError, match=r"saved by 2 processes.*there are 1 now. Resume with 2 processes, or"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 1
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.algorithm.guidance.batches == 2


def test_saving_the_model_only_leaves_no_state(tmp_path):
    run(tmp_path, max_steps=1, save_steps=1, save_only_model=True)
    assert not (tmp_path / "checkpoint-1" / "mentor_state_0.pt").exists()
