import json
from pathlib import Path

import pytest

from fake_server import serving
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.cli import main as cli
from mentor_trl.cli import train
from mentor_trl.planning import servers, trial
from mentor_trl.planning.checks import Check
from policy_server import PolicyStandIn
from served_helpers import stand_in
from stock_server import StockServer


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_dir, tiny_expert_dir):
    (tmp_path / "policy").symlink_to(tiny_model_dir)
    (tmp_path / "expert").symlink_to(tiny_expert_dir)
    row = {"prompt": "1+1=", "solution": "2"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def write(place: Path, *method: str, **changes) -> str:
    """A recipe of `mentor-trl init`, with other values."""
    expert = [] if "grpo" in method else ["--expert", "expert"]
    flags = ["--policy", "policy", *expert, "--dataset_name", "rows.jsonl", "--gpus", "0", "--force", *method]
    assert cli.main(["init", *flags, "--output", "run.yaml"]) == 0
    path = place / "run.yaml"
    dropped = [name for name, value in changes.items() if value is None]
    lines = [line for line in path.read_text().splitlines() if line.split(":")[0] not in changes]
    lines += [f"{name}: {json.dumps(value)}" for name, value in changes.items() if name not in dropped]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def dry_run(path: str, *flags: str) -> int:
    return train.run(["--config", path, "--dry_run", *flags])


@pytest.mark.parametrize("method", ["mentor", "grpo", "opd", "gats", "distilled_rl"])
def test_a_recipe_of_init_is_tried(place, capsys, method):
    path = write(place, "--method", method)
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    assert dry_run(path) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and " NO" not in out
    words = " ".join(out.split())
    mixed = ", 4 of them mixed" if method in ("mentor", "gats") else ""
    assert f"One step on 8 rollouts{mixed}, up to 16 tokens each" in words
    assert "Nothing was written to outputs/policy." in words and "gradient norm" in words
    assert sorted(place.rglob("*")) == before


def test_the_batch_is_small_whatever_the_run_is(place, capsys):
    sizes = {"generation_batch_size": 32, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 32}
    options = {"num_generations": 6, "num_mixed_generations": 2, "dynamic_sampling": 1, "save_steps": 1}
    options |= {"max_completion_length": 5, "log_completions": True, "eval_strategy": "no", "num_iterations": 2}
    path = write(place, **(sizes | options | {"generation_batch_size": 96}))
    assert dry_run(path) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "One step on 6 rollouts, 2 of them mixed, up to 5 tokens each" in words


def test_nothing_is_tried_where_something_does_not_fit(place, capsys, monkeypatch):
    path = write(place, max_completion_length=2040)
    monkeypatch.setattr(train, "_make_trainer", lambda *args: pytest.fail("not checked first"))
    with pytest.raises(SystemExit) as stop:
        dry_run(path)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and "context: does not fit, as said above" in error
    assert "NO: context: A prompt of" in out
    with pytest.raises(SystemExit):
        dry_run(path, "--max_completion_length", "8", "--output_dir", "rows.jsonl/out")
    assert "output_dir: does not fit" in capsys.readouterr().err


def test_a_memory_that_is_too_small_by_estimate_refuses_nothing(place, capsys, monkeypatch):
    path = write(place)
    monkeypatch.setattr(trial, "room", lambda *args: 1e6)
    assert dry_run(path) == 0
    out = capsys.readouterr().out
    assert "note: memory: The largest parts" in out and "One step" in out


def test_servers_are_asked(place, capsys):
    path = write(place, expert_model_name_or_path=None, expert_base_url="http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stop:
        dry_run(path)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and "expert's server: does not fit" in error
    assert "http://127.0.0.1:9 does not answer" in out
    stock = StockServer(make_tiny_model(seed=1), make_tiny_tokenizer(), stops=(2,), positions=2048)
    with serving(stock) as url:
        assert dry_run(path, "--expert_base_url", url) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"{url}: expert, context 2,048" in words and "One step on 8 rollouts, 4 of them mixed" in words


@pytest.mark.parametrize("mixed", [4, 0])
def test_the_server_of_the_policy_is_asked(place, capsys, monkeypatch, mixed):
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:9"}
    path = write(place, expert_model_name_or_path=None, num_mixed_generations=mixed, **served)
    with pytest.raises(SystemExit):
        dry_run(path)
    assert "policy's server: does not fit" in capsys.readouterr().err
    if mixed:
        monkeypatch.setattr(trial, "check_policy_server", lambda *args: [Check("policy's server", "answers")])
        with stand_in() as made:
            assert dry_run(path) == 0
        assert "One step on 8 rollouts" in capsys.readouterr().out and made[0].requests


def test_what_servers_say(tiny_model_dir):
    with serving(PolicyStandIn({"initial": make_tiny_model(vocab_size=5)})) as url:
        assert servers.check_policy_server(url) == [Check("policy's server", f"{url}: policy")]
        assert servers.check_health(url) == [Check("policy's server", f"{url}: answers")]
        assert servers.check_expert_server(url) == [Check("expert's server", f"{url}: policy")]
