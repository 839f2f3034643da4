import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import store  # noqa: E402
from benchmarks.study.evaluate import judged  # noqa: E402


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/study/study_run.py"), *arguments, "--results", str(folder / "lines")]
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(tmp_path):
    for name in ("recipes", "benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    file = tmp_path / "lines" / "main.jsonl"
    process = start(tmp_path, "main", "--jobs", "1")
    deadline = time.monotonic() + 240
    while len(store.read(file)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = store.read(file)
    assert 2 <= len(before) < 4, (tmp_path / "log.txt").read_text()

    assert start(tmp_path, "main", "other").wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()
    lines = store.read(file)
    assert lines[: len(before)] == before
    assert sorted(line["arm"] for line in lines) == ["grpo", "mentor", "policy", "sft_grpo"]
    by_arm = {line["arm"]: line for line in lines}
    assert by_arm["policy"]["steps"] == [0]
    for arm in ("grpo", "mentor", "sft_grpo"):
        line = by_arm[arm]
        assert line["steps"] == [0, 2, 4] and len(line["accuracy"]) == len(line["cost"]) == 3
        assert line["cost"][0] == 0.0 < line["cost"][1] < line["cost"][2]
        assert line["accuracy"][0] == by_arm["policy"]["accuracy"][0]
    assert by_arm["grpo"]["expert_tokens"] == [0.0, 0.0, 0.0]
    assert by_arm["mentor"]["expert_tokens"][2] > 0.0 and by_arm["mentor"]["metrics"]["mentor/alpha"][0] > 0.0
    # Another study has the same run: its line is taken over
    (other,) = store.read(tmp_path / "lines" / "other.jsonl")
    assert other["accuracy"] == by_arm["grpo"]["accuracy"] and other["seconds"] == by_arm["grpo"]["seconds"]


def test_evaluation_by_hand():
    rows = [{"prompt": "a", "solution": "x"}] * 4 + [{"prompt": "b", "solution": "y"}] * 4
    texts = ["x", "x 1", "x 2", "z", "y", "y", "z", "z"]
    result = judged(
        rows,
        texts,
        entropies=[1.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0],
        lengths=[1, 2, 2, 1, 1, 1, 1, 1],
        num_samples=4,
        reward=lambda prompts, completions, solution: [float(t[0] == s) for t, s in zip(completions, solution)],
        describe=lambda prompt, text: {"solution": text, "words": len(text.split())},
    )
    assert result.pop("pass_at") == pytest.approx({"1": 5 / 8, "2": (1 + 5 / 6) / 2, "4": 1.0})
    assert result == {
        "accuracy": 5 / 8,
        "entropy": 0.4,
        "length": 1.25,
        "distinct": 2.0,  # three ways to say x, one to say y
        "describe": {"words": 1.25},
    }
