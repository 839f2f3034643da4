"""The benchmarks run from end to end; what they measure is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
TINY = "--rows 8 --tokens 8 --prompt 4 --hidden 128 --layers 1 --vocab 64 --draft-length 2 --repeats 2 --warmup 1"
PARTS = ("sampling", "weights", "rest")


def run_training_step(tmp_path: Path, *options: str) -> tuple[str, dict]:
    """What `benchmarks/training_step.py` prints, and its JSON."""
    script, results = ROOT / "benchmarks" / "training_step.py", tmp_path / "results.json"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *TINY.split(), "--device", "cpu", "--json", str(results), *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout, json.loads(results.read_text())


def check_steps(results: dict, seeds: int = 1) -> None:
    for steps in results["steps"].values():
        assert len(steps) == 2 * seeds
        for step in steps:
            assert sum(step[part] for part in PARTS) == pytest.approx(step["seconds"])
            assert step["sampling"] > 0.0 and step["rest"] > 0.0
            assert step["logged"]["completions/mean_length"] == 8.0


@pytest.mark.slow
def test_training_step_in_process(tmp_path):
    printed, results = run_training_step(tmp_path, "--weight", "0.2")
    grpo, mentor = results["summary"]
    assert (grpo["ratio"], grpo["weights"], mentor["weights"]) == (1.0, 0.0, 0.0)
    # gamma comes from the entropies of the first step, by which the policy has hardly changed
    assert mentor["mentor/weight"] == pytest.approx(0.2, abs=0.03) and "mentor/weight" not in grpo
    check_steps(results)
    assert set(results["steps"][grpo["arm"]][0]["parts"]) >= {"transformers.generate"}
    assert set(results["steps"][mentor["arm"]][0]["parts"]) >= {"mentor.on_policy", "mentor.mixed"}
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


@pytest.mark.vllm
@pytest.mark.shared_engine
@pytest.mark.slow
def test_training_step_with_a_server(tmp_path):
    _, results = run_training_step(tmp_path, "--engine", "server", "--eager", "--memory", "0.1")
    plain, mentor, local = results["summary"]
    assert "mentor/weight" in mentor and "mentor/weight" not in plain and "mentor/weight" not in local
    assert plain["weights"] > 0.0 and mentor["weights"] > 0.0 and local["weights"] == 0.0
    check_steps(results)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rows 12", "multiple of --generations"),
        ("--policy folder", "come together"),
        ("--server http://127.0.0.1:1", "--policy and --expert that it serves"),
        ("--engine server --policy p --expert e --trl-server http://127.0.0.1:1", "over NCCL"),
    ],
)
def test_training_step_names_options_that_do_not_fit(options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--device", "cpu", *options.split()])
    import training_step

    with pytest.raises(SystemExit):
        training_step.parse_args()
    assert message in capsys.readouterr().err
