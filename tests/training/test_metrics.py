"""Metrics: hand computations, and docs/metrics.md against what runs log."""

import math
import re
from pathlib import Path

import pytest
import torch

from mentor_trl import accuracy_reward
from mentor_trl.rollout import MixedRollout
from mentor_trl.rollout.types import BOOL_RECORDS, FLOAT_RECORDS
from mentor_trl.training.metrics import guidance_metrics, row_metrics, share_without_spread, token_metrics
from trainer_helpers import make_trainer, prompts


NAN = math.nan


def test_rows_by_source():
    metrics = row_metrics(
        sources=("on_policy", "mixed"),
        source_N=torch.tensor([0, 0, 1, 0, 1]),
        rewards_N=torch.tensor([1.0, 0.0, 0.5, NAN, 1.0]),
        rewards_per_func_N_F=torch.tensor([[1.0, NAN], [0.0, NAN], [0.5, 2.0], [NAN, NAN], [1.0, 4.0]]),
        func_names=["accuracy", "format"],
        advantages_N=torch.tensor([0.7, -0.7, 0.0, 0.0, 0.5]),
        lengths_N=torch.tensor([3, 5, 8, 1, 4]),
        truncated_N=torch.tensor([False, True, True, False, False]),
    )
    expected = {
        "on_policy/rows": 3.0,
        "on_policy/reward": 0.5,
        "on_policy/reward_std": math.sqrt(0.5),
        "on_policy/length": 3.0,
        "on_policy/truncated": 1 / 3,
        "on_policy/advantage": 0.0,
        "on_policy/advantage_nonzero": 2 / 3,
        "on_policy/rewards/accuracy": 0.5,
        "on_policy/rewards/format": NAN,
        "mixed/rows": 2.0,
        "mixed/reward": 0.75,
        "mixed/reward_std": math.sqrt(0.125),
        "mixed/length": 6.0,
        "mixed/truncated": 0.5,
        "mixed/advantage": 0.25,
        "mixed/advantage_nonzero": 0.5,
        "mixed/rewards/accuracy": 0.75,
        "mixed/rewards/format": 3.0,
    }
    assert metrics == pytest.approx({f"mentor/{name}": value for name, value in expected.items()}, nan_ok=True)


def test_a_source_without_rows_has_no_metrics():
    ones = torch.ones(2)
    metrics = row_metrics(("on_policy", "mixed"), torch.zeros(2), ones, ones[:, None], ["f"], ones, ones, ones.bool())
    assert metrics and all(name.startswith("mentor/on_policy/") for name in metrics)


def test_sources_have_the_names_that_they_are_given():
    ones, sources = torch.ones(3), ("on_policy", "trajectory", "another")
    rows = torch.tensor([0, 1, 2])
    metrics = row_metrics(sources, rows, ones, ones[:, None], ["f"], ones, ones, ones.bool())
    assert {name.split("/")[1] for name in metrics} == set(sources)
    values = {"kl": torch.arange(3.0).unsqueeze(1).expand(3, 3)}
    means = token_metrics(sources, rows, values, torch.ones(3, 3), lambda sums, how: sums)
    assert means == {f"mentor/{source}/kl": float(i) for i, source in enumerate(sources)}


def test_share_of_groups_without_spread():
    mixed = torch.tensor([False, False, True] * 3)
    #                        equal on-policy rows   spread            one defined row is no spread
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, NAN, 1.0, 0.0])
    assert share_without_spread(rewards[:6], mixed[:6], 3) == pytest.approx(0.5)
    assert 0.0 <= share_without_spread(rewards, mixed, 3) <= 1.0
    # all rows are mixed: their rewards are the baseline
    assert share_without_spread(torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.ones(4, dtype=torch.bool), 2) == 0.5


def make_rollout(**stats) -> MixedRollout:
    """Two rows of three and two tokens."""
    return MixedRollout(
        completion_ids=[[5, 6, 7], [8, 9]],
        entropies=torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, NAN]]),
        weights=torch.tensor([[0.5, 1.0, 0.25], [0.5, 0.5, NAN]]),
        logps=torch.tensor([[0.5, 0.02, 0.9], [0.4, 0.3, NAN]]).log(),
        expert_logps=torch.tensor([[0.25, 0.4, NAN], [0.8, NAN, NAN]]).log(),
        mixed_logps=torch.tensor([[0.375, 0.4, NAN], [0.6, NAN, NAN]]).log(),
        branch=torch.tensor([[True, True, False], [True, False, False]]),
        replaced=torch.tensor([[False, True, False], [True, False, False]]),
        stats={"rounds": 4, "batch_rounds": 5, "expert_rounds": 3, **stats},
    )


def test_guidance_by_hand():
    rollout = make_rollout()
    ratio = (rollout.logps - rollout.expert_logps).exp()  # 2, 0.05 and 0.5 at the branch points
    rho = torch.where(rollout.branch, ratio.clamp(max=1.0) ** 0.5, 1.0)
    metrics = guidance_metrics(rollout, ratio, rho, rollout.branch, lambda values, how: values)
    expected = {
        "weight": (0.5 + 1.0 + 0.25 + 0.5 + 0.5) / 5,
        "branch_rate": 3 / 5,
        "replaced_rate": 2 / 5,
        "acceptance": 3 / 5,
        "tokens_per_round": 5 / 4,
        "expert_calls_avoided": 2 / 5,
        "importance_ratio/mean": (2 + 0.05 + 0.5) / 3,
        "importance_ratio/below_0.1": 1 / 3,
        "importance_ratio/replaced_mean": (0.05 + 0.5) / 2,
        "importance_ratio/min": 0.05,
        "importance_ratio/max": 2.0,
        "correction/mean": (1 + math.sqrt(0.05) + math.sqrt(0.5)) / 3,
        "correction/replaced_mean": (math.sqrt(0.05) + math.sqrt(0.5)) / 2,
    }
    assert metrics == pytest.approx({f"mentor/{name}": value for name, value in expected.items()}, rel=1e-5)


def test_guidance_of_no_rows_and_of_no_branch_points():
    empty = torch.zeros(0, 4)
    none = MixedRollout([], **dict.fromkeys(FLOAT_RECORDS, empty), **dict.fromkeys(BOOL_RECORDS, empty.bool()))
    metrics = guidance_metrics(none, empty, empty, empty.bool(), lambda values, how: values)
    assert all(math.isnan(value) for value in metrics.values())

    quiet = make_rollout()
    quiet.branch, quiet.replaced = torch.zeros(2, 3).bool(), torch.zeros(2, 3).bool()
    nowhere = torch.full((2, 3), NAN)
    metrics = guidance_metrics(quiet, nowhere, torch.ones(2, 3), quiet.branch, lambda values, how: values)
    assert metrics["mentor/branch_rate"] == 0.0 and metrics["mentor/acceptance"] == 1.0
    assert math.isnan(metrics["mentor/importance_ratio/mean"]) and math.isnan(metrics["mentor/importance_ratio/max"])


def test_guidance_is_summed_over_processes_before_dividing():
    """Two processes, the second of which has no mixed rows: the rates are those of the first."""
    rollout = make_rollout()
    ratio = (rollout.logps - rollout.expert_logps).exp()
    alone = guidance_metrics(rollout, ratio, ratio, rollout.branch, lambda values, how: values)

    def with_an_empty_process(values, how):
        other = {"sum": 0.0, "min": math.inf, "max": -math.inf}[how]
        rows = torch.stack([values, torch.full_like(values, other)])
        return {"sum": rows.sum(0), "min": rows.min(0).values, "max": rows.max(0).values}[how]

    assert guidance_metrics(rollout, ratio, ratio, rollout.branch, with_an_empty_process) == alone


@pytest.mark.parametrize(("here", "there"), [(0, 1), (1, 0)])
def test_guidance_takes_the_extremes_of_all_processes(here, there):
    """Two processes of a row each, the ratios of one (2 and 0.05) on both sides of the other's (0.5)."""
    parts = make_rollout(seconds=1.0).split([1, 1])
    ratios = [(part.logps - part.expert_logps).exp() for part in parts]
    other = ratios[there][parts[there].branch]

    def with_the_other(values, how):
        rows = torch.cat([values, getattr(other, how)().view(1)])
        return values if how == "sum" else getattr(rows, how)().view(1)

    metrics = guidance_metrics(parts[here], ratios[here], ratios[here], parts[here].branch, with_the_other)
    assert metrics["mentor/importance_ratio/min"] == pytest.approx(0.05)
    assert metrics["mentor/importance_ratio/max"] == pytest.approx(2.0)


def test_token_means_by_source():
    values = {"entropy": torch.tensor([[1.0, 2.0], [3.0, NAN], [5.0, 6.0]]), "kl": torch.ones(3, 2)}
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    sums = []

    def reduce(values: torch.Tensor, how: str) -> torch.Tensor:
        sums.append((values.tolist(), how))
        return values

    sources = ("on_policy", "mixed")
    assert token_metrics(sources, torch.tensor([0, 0, 1]), values, mask, reduce) == {
        "mentor/on_policy/entropy": 2.0,
        "mentor/on_policy/kl": 1.0,
        "mentor/mixed/entropy": 5.5,
        "mentor/mixed/kl": 1.0,
    }
    assert sums == [([[3.0, 6.0, 3.0], [2.0, 11.0, 2.0]], "sum")]
    assert token_metrics(sources, torch.zeros(3), values, mask, reduce).keys() == {
        "mentor/on_policy/entropy",
        "mentor/on_policy/kl",
    }


def logged(trainer) -> set[str]:
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry if "mentor/" in name}
    return {name.replace("rewards/letters_reward", "rewards/<func>") for name in names}


def test_documented_metrics_are_the_logged_ones(tmp_path, tiny_model_dir):
    guided = logged(make_trainer(tmp_path / "a", model=str(tiny_model_dir), beta=0.05))
    decayed = logged(make_trainer(tmp_path / "b", expert_decay_steps=1))
    measured = logged(make_trainer(tmp_path / "e", alpha_schedule="adaptive", per_device_train_batch_size=16))
    failing = logged(make_trainer(tmp_path / "f", guide_prompts="failing"))
    assert {name for name in failing if "guidance/" in name} < {name for name in measured if "guidance/" in name}
    plain = logged(make_trainer(tmp_path / "c", num_mixed_generations=0))
    trajectories = prompts().add_column("trajectory", ["abc"] * 40)
    luffy = {"num_mixed_generations": 0, "num_trajectory_generations": 1, "train_dataset": trajectories}
    luffy = logged(make_trainer(tmp_path / "d", model=str(tiny_model_dir), beta=0.05, **luffy))
    again = logged(make_trainer(tmp_path / "e", num_mixed_generations=0, dynamic_sampling=1))
    assert luffy and not any("/mixed/" in name for name in luffy)
    assert plain and not any("/mixed/" in name for name in plain)
    by_rewards = set()
    accuracy_reward(
        [[{"role": "assistant", "content": "\\boxed{2}"}]],
        solution=["$2$"],
        log_extra=lambda *args: None,
        log_metric=lambda name, value: by_rewards.add(name),
    )
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    found = guided | decayed | measured | plain | luffy | again | by_rewards
    assert found == set(re.findall(r"`(mentor/[^`]*)`", text))
