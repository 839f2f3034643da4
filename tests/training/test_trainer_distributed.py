"""Training on two processes of the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from distributed_run import CASES, DISTILLED, RESUME, SERVED, half_reward, problems

from trainer_helpers import advantages_by_hand, make_trainer, same_weights


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder of one launch of distributed_run.py, which trains everything that is looked at here."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    done = subprocess.run(
        [*command, str(root / "tests" / "distributed_run.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", [*CASES, *SERVED])
def test_rows_have_the_advantages_of_the_whole_batch(case, ranks):
    settings = {"num_generations": 8, "num_mixed_generations": 4, "scale_rewards": "group", **(CASES | SERVED)[case]}
    size, mixed = settings["num_generations"], settings["num_mixed_generations"]
    count = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    for first, second in zip(ranks[0][case]["batches"], ranks[1][case]["batches"], strict=True):
        rewards = first["rewards"].tolist()
        assert len(rewards) == 2 * count and torch.equal(
            first["rewards"].nan_to_num(9), second["rewards"].nan_to_num(9)
        )
        guided = mixed if first["alpha"] > 0.0 else 0
        rows = advantages_by_hand(rewards, size, guided, first["alpha"], settings["scale_rewards"])
        for rank, batch in enumerate((first, second)):
            here = slice(rank * count, (rank + 1) * count)
            assert batch["row_advantages"] == pytest.approx(rows, abs=1e-5)
            assert batch["guided"].tolist() == [i % size >= size - guided for i in range(2 * count)][here]
            # On-policy tokens carry the advantage of their row
            advantages = batch["advantages"] if guided else batch["advantages"].unsqueeze(1)
            for i, row in enumerate(rows[here]):
                if not batch["guided"][i]:
                    assert advantages[i].tolist() == pytest.approx([row] * advantages.size(1), abs=1e-5)
                else:
                    assert (advantages[i] <= row + 1e-5).all() and (advantages[i] >= 0.0).all()


def test_what_the_cases_cover(ranks):
    sources = [[r[case]["batches"][0]["guided"] for r in ranks] for case in ("split_4_4", "split_3_5")]
    assert not sources[0][0].any() and sources[0][1].all()
    assert sources[1][0].tolist()[:4] == [False] * 3 + [True]
    assert ranks[0]["undefined_rewards"]["batches"][0]["rewards"].isnan().sum() == 2
    lengths = [[batch["completion_mask"].size(1) for batch in r["served_uneven"]["batches"]] for r in ranks]
    assert lengths[0] != lengths[1]
    assert not any(torch.isnan(r["undefined_rewards"]["batches"][0]["advantages"]).any() for r in ranks)


@pytest.mark.parametrize("case", [*CASES, "failing", "served_failing", "whole", "resumed"])
def test_processes_stay_equal(case, ranks, tmp_path):
    first, second = (rank[case] for rank in ranks)
    assert same_weights(first["weights"], second["weights"])
    assert first["guidance"] == second["guidance"]
    start = make_trainer(tmp_path, num_mixed_generations=0).model.state_dict()
    assert not same_weights(dict(start), first["weights"])


def test_trajectories_take_the_last_places_of_groups_that_lie_across_processes(ranks):
    runs = [rank["trajectories"] for rank in ranks]
    texts = {row["prompt"]: row["trajectory"] for row in problems()}
    missing = []
    for batches in zip(*(run["batches"] for run in runs), strict=True):
        rows = [row for batch in batches for row in zip(batch["prompts"], batch["completions"], batch["trajectory"])]
        for i, (prompt, completion, trajectory) in enumerate(rows):
            due = i % 6 >= 4 and texts[prompt] is not None
            assert trajectory == due and (completion == texts[prompt]) == due
        missing.append(1.0 - sum(row[2].item() for row in rows) / 6)
    found = [entry["mentor/trajectory/missing"] for entry in runs[0]["history"] if "reward" in entry]
    assert found[: len(missing)] == pytest.approx(missing) and 0.0 < max(missing) < 1.0
    assert same_weights(runs[0]["weights"], runs[1]["weights"])


def test_groups_are_sampled_again_on_their_process(ranks, folder):
    runs = [rank["resampled"] for rank in ranks]
    assert same_weights(runs[0]["weights"], runs[1]["weights"])
    assert runs[0]["drawn"] == runs[1]["drawn"] > 0 and runs[0]["guidance"] == runs[1]["guidance"]
    logs = [entry for entry in runs[0]["history"] if "loss" in entry]
    assert max(entry["mentor/resampling/rounds"] for entry in logs) > 1
    for step, (batches, entry) in enumerate(zip(zip(*(run["batches"] for run in runs)), logs), start=1):
        table = pd.read_parquet(folder / "resampled" / "completions" / f"completions_{step:05d}.parquet")
        assert table["prompt"].tolist() == [text for batch in batches for text in batch["prompt_ids"]]
        assert table["completion"].tolist() == [text for batch in batches for text in batch["completion_ids"]]
        rewards = half_reward(table["prompt"], table["completion"])
        assert table["half_reward"].tolist() == pytest.approx(rewards)
        assert table["advantage"].tolist() == pytest.approx(advantages_by_hand(rewards, 4, 2, 1.0), abs=2e-3)
        assert [batch["row_advantages"] for batch in batches] == [table["advantage"].tolist()] * 2
        # A group of an odd prompt has an advantage; those of even ones are left where the rounds are used up
        odd = [number % 2 for number in table["prompt"].str.partition("+")[0].astype(int)][::4]
        assert sum(odd) / 4 == 1.0 - entry["mentor/resampling/left"]
        assert entry["mentor/resampling/left"] == 0.0 or entry["mentor/resampling/rounds"] == 3
        total = sum(batch["completion_mask"].sum().item() for batch in batches)
        assert [batch["num_items_in_batch"].item() for batch in batches] == [total] * 2


@pytest.mark.parametrize("case", ["failing", "served_failing"])
def test_processes_agree_on_the_prompts_that_are_guided(case, ranks):
    batches = [rank[case]["batches"] for rank in ranks]
    guided = [torch.cat([pair[0]["guided"], pair[1]["guided"]]).view(4, 8) for pair in zip(*batches, strict=True)]
    state = ranks[0][case]["guidance"]["withdrawal"]
    assert state["withdrawn"] and state["rested"] == 2
    for index, groups in enumerate(guided):
        first = batches[0][index]["rewards"].view(4, 8)[:, :4] >= 0.5
        failing = first.float().mean(1) < 0.6
        assert not groups[:, :4].any() and (groups[:, 4:].all(1) == groups.any(1)).all()
        if index < 3:  # before the withdrawal one group is drawn in any case
            assert (groups.any(1) & ~failing).sum() <= 1 and groups.any(1)[failing].all()
    assert [groups.any(1).sum().item() for groups in guided[3:]] == [0, 1]
    for batch in (batches[0][4], batches[1][4]):
        assert ((batch["lengths"] == 0) == batch["guided"]).all()


@pytest.mark.parametrize("method", DISTILLED)
def test_scores_of_an_expert_are_summed_over_processes(method, ranks):
    first, second = (rank["distilled"][method] for rank in ranks)
    assert same_weights(first["weights"], second["weights"]) and first["state"] == second["state"]
    logged = [[m for metrics in run["metrics"] for m in metrics.items()] for run in (first, second)]
    assert [name for name, _ in logged[0]] == [name for name, _ in logged[1]]
    assert [v for _, v in logged[0]] == pytest.approx([v for _, v in logged[1]], nan_ok=True)
    found = [value for name, value in logged[0] if name == "mentor/distillation/expert_tokens"]
    tokens = [sum(run["batches"][i]["completion_mask"].sum().item() for run in (first, second)) for i in range(3)]
    assert found == tokens if method != "distilled_rl" else all(0 < a < b for a, b in zip(found, tokens))


def test_processes_and_sources_sample_from_their_own_generators(ranks):
    """The rows of one prompt lie on several processes, and must not repeat each other."""
    assert len({seed for rank in ranks for seed in rank["across"]["seeds"]}) == 4


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_equal_on_both(case, ranks):
    first, second = ([m for metrics in rank[case]["metrics"] for m in metrics.items()] for rank in ranks)
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, a), (_, b) in zip(first, second):
        assert a == pytest.approx(b, nan_ok=True), name


def test_resuming_in_the_middle_of_a_batch_repeats_the_run(ranks):
    # The first log behind the checkpoint lies in its window: see test_trainer_resume.py
    without = ("loss", "grad_norm", "train_loss")
    for rank in ranks:
        logs = [
            [{k: v for k, v in entry.items() if k not in without} for entry in rank[run]["history"]]
            for run in ("whole", "resumed")
        ]
        assert logs[0] == logs[1]
        assert same_weights(rank["whole"]["weights"], rank["resumed"]["weights"])
        assert rank["whole"]["guidance"] == rank["resumed"]["guidance"]


def test_the_model_card_is_written_once_and_whole(folder):
    text = (folder / "whole" / "README.md").read_text()
    assert text.count("### Settings") == text.count("The expert was") == 1
    # 8 rows of each process
    assert "| generation_batch_size | `16` |" in text


def test_another_number_of_processes_in_the_middle_of_a_batch(folder, tmp_path):
    settings = {**RESUME, "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"saved by 2 processes in the middle of a rollout batch.*there are 1 now"):
        trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))


@pytest.mark.parametrize("case", SERVED)
def test_rows_of_a_server_come_back_to_the_process_that_they_belong_to(case, ranks):
    """A row on the wrong process, behind another prompt, would not have the policy's log-probabilities there."""
    assert [rank[case]["servers"] for rank in ranks] == [2 if case == "served_by_two" else 1, 0]
    for rank in ranks:
        for off in rank[case]["off"]:
            found = off[~off.isnan()]
            assert found.abs().max() < 1e-4 if found.numel() else off.numel() > 0
    assert sum(sum(rank[case]["branch"]) for rank in ranks) > 0
    assert same_weights(ranks[0][case]["weights"], ranks[1][case]["weights"])


def test_a_failing_server_ends_all_processes_with_a_checkpoint(ranks, folder):
    assert ranks[0]["broken"] == "the server is gone"
    assert ranks[1]["broken"] == "On the main process: the server is gone"
    states = [folder / "broken" / "checkpoint-2" / f"mentor_state_{rank}.pt" for rank in (0, 1)]
    assert all(state.exists() for state in states)


def test_a_push_that_fails_leaves_no_process_behind(ranks):
    """Bringing sharded weights together is collective: the main process goes on with it after its failure."""
    assert [rank["unsent"] for rank in ranks] == ["No space left", "On the main process: No space left"]
