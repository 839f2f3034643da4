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
SAMPLING = ("transformers.generate", "mentor.on_policy", "mentor.mixed", "mentor.rollouts")


def run_script(name: str, *options: str) -> str:
    """What a benchmark prints."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--device", "cpu", *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def run_training_step(tmp_path: Path, *options: str) -> tuple[str, dict]:
    """What `benchmarks/training_step.py` prints, and its JSON."""
    results = tmp_path / "results.json"
    printed = run_script("training_step.py", *TINY.split(), "--json", str(results), *options)
    return printed, json.loads(results.read_text())


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


@pytest.mark.slow
def test_training_step_without_guidance(tmp_path):
    _, results = run_training_step(tmp_path, "--withdrawn", "--rows", "16")
    check_steps(results)
    for name, ways in zip(results["steps"], ({"transformers.generate"}, {"mentor.on_policy", "mentor.mixed"}) * 2):
        for step in results["steps"][name]:
            assert {part for part in SAMPLING if step["parts"].get(part)} == ways, name


@pytest.mark.vllm
@pytest.mark.shared_engine
@pytest.mark.slow
def test_training_step_with_a_server(tmp_path):
    _, results = run_training_step(tmp_path, "--engine", "server", "--eager", "--memory", "0.1")
    plain, mentor, local = results["summary"]
    assert "mentor/weight" in mentor and "mentor/weight" not in plain and "mentor/weight" not in local
    assert plain["weights"] > 0.0 and mentor["weights"] > 0.0 and local["weights"] == 0.0
    check_steps(results)


def test_withdrawal_rule(monkeypatch, capsys):
    """Guidance that helps is not lost, and guidance that does not help is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["withdrawal_rule.py", *"--prompts 8 128 --batches 60 --runs 3".split()])
    import withdrawal_rule

    withdrawal_rule.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shares = {name: [cell.split(" ")[0] for cell in cells] for name, *cells in rows}
    assert all(shares[name] == ["1.00", "1.00"] for name in ("level, .9", "level, .5", "worse, .3 and .2"))
    kept = ("better, .5 and .6", "sparse, .02 and .05", "nothing yet, 0 and 0", "half solved, the others 0 and .3")
    assert all(shares[name] == ["0.00", "0.00"] for name in kept)


def test_branch_points(tmp_path, monkeypatch, capsys, tiny_model_dir, tiny_expert_dir):
    """Random positions have the share that they are given, and the hard threshold that of its quantile."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i} +"}) + "\n" for i in range(8)))
    given = ["--policy", str(tiny_model_dir), "--expert", str(tiny_expert_dir), "--tokens", "96"]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["branch_points.py", *given, "--dataset", str(tmp_path / "rows.jsonl")])
    import branch_points

    branch_points.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if line.startswith("|")]
    shares = {name: float(share.rstrip("%")) for name, _, share, *_ in rows[2:]}
    assert set(shares) == set(branch_points.RULES)
    assert 5.0 < shares["random, share .1"] < 15.0 and shares["threshold"] < 12.0
    assert shares["entropy"] > shares["entropy, gamma 6 nats"] > 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rows 12", "multiple of --generations"),
        ("--policy folder", "come together"),
        ("--withdrawn --rows 8", "at least two prompts"),
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


@pytest.mark.vllm
@pytest.mark.shared_engine
@pytest.mark.slow
def test_engines(tmp_path):
    lines = tmp_path / "engines.jsonl"
    tiny = "--rows 4 --tokens 16 --prompt 8 --hidden 64 --layers 1 --vocab 256 --share 0 0.3 --repeats 1 --rounds 1"
    tiny += " --step-rows 8 --generations 4 --step-tokens 24 --step-mean 4 --step-share 0.2 --steps 1 --warmup 1"
    printed = run_script("engines.py", *tiny.split(), "--output", str(lines))
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    part = lambda name: [result for result in results if result["part"] == name]
    runs = {(run["rule"], run["engine"]): run for run in part("sampling run")}
    assert len(runs) == 4 * 5
    servers = runs["random", "stock servers"]
    # The coins of the rule "random" are the rows' own: both ways on stock vLLM have the same branch points
    assert servers["weight"] == runs["random", "stock, policy in this process"]["weight"] > 0.1
    plain = runs["none", "stock servers"]
    # One request a row, and some that ask whether the server is still the same
    assert plain["weight"] == 0.0 and 4 <= plain["requests"] < servers["requests"]
    assert servers["sent"] > 1000 and servers["received"] > 1000
    assert all(run["engine_cpu"] > 0.0 for run in runs.values())
    assert {row["engine"] for row in part("steps")} == {"in process", "stock servers"} and len(part("step run")) == 4
    assert len(part("crossing")) == 3 * 2 * 2 and len(part("processor")) == 5
    assert sum(line.startswith("| ---") for line in printed.splitlines()) == 4
