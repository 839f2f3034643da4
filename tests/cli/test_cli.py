import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mentor_trl.cli import main as cli
from mentor_trl.cli import train


@pytest.fixture
def launched(monkeypatch) -> list:
    """What would have been launched: (script, launch arguments, script arguments)."""
    calls = []
    monkeypatch.setattr(cli, "launch_script", lambda *args: calls.append(args) or 0)
    return calls


def write_config(tmp_path: Path, **config) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def error_of(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from mentor_trl.cli import main as cli; cli.main([]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "--version" in done.stdout


def test_version_names_the_base(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"<{name}>")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert (
        capsys.readouterr().out == "mentor-trl <mentor-trl> (trl <trl>, transformers <transformers>, torch <torch>)\n"
    )


def test_unknown_command(capsys):
    assert "invalid choice: 'trian'" in error_of(capsys, ["trian"])


def test_help_of_train_has_every_field_once_and_ours_first(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    parser = train.make_parser()
    fields = {action.dest for action in parser._actions} - {"help"}
    shown = [name.lstrip("-").removeprefix("no_") for name in names]
    assert fields == set(shown) & fields and len(shown) == len(set(shown))
    titles = ["expert and mixed rollouts:", "data and rewards:", "model:", "all other training options:"]
    positions = [text.index(title) for title in titles]
    assert positions == sorted(positions)
    assert positions[0] < text.index("--expert_model_name_or_path") < positions[1] < text.index("--reward_funcs")


def test_flags_go_to_the_script_and_launch_flags_to_accelerate(launched):
    argv = "train --learning_rate 8 --num_processes 8 --reward_funcs a b --mixed_precision=bf16 --max_steps 8".split()
    assert cli.main(argv) == 0
    assert launched == [
        (
            "train.py",
            ["--num_processes", "8", "--mixed_precision=bf16"],
            "--learning_rate 8 --reward_funcs a b --max_steps 8".split(),
        )
    ]


def test_config_file_may_hold_launch_options_and_environment(launched, tmp_path, monkeypatch):
    monkeypatch.delenv("MENTOR_TEST", raising=False)
    config = write_config(
        tmp_path,
        accelerate_config="zero3",
        num_processes=8,
        multi_gpu=True,
        use_cpu=False,
        num_generations=4,
        env={"MENTOR_TEST": 7},
    )
    assert cli.main(["train", f"--config={config}", "--num_machines", "2"]) == 0
    ((_, launch_args, script_args),) = launched
    assert launch_args[0] == "--config_file" and launch_args[1].endswith("accelerate_configs/zero3.yaml")
    assert launch_args[2:] == ["--num_processes", "8", "--multi_gpu", "--num_machines", "2"]
    assert script_args == ["--config", config]
    assert os.environ.pop("MENTOR_TEST") == "7"


def test_accelerate_understands_the_launch_arguments(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    own = tmp_path / "accelerate.yaml"
    own.write_text("distributed_type: 'NO'\n")
    config = write_config(tmp_path, accelerate_config=str(own), num_processes=2, multi_gpu=True, max_steps=3)
    assert cli.main(["train", "--config", config, "--seed", "1"]) == 0
    (args,) = seen
    assert (args.config_file, args.num_processes, args.multi_gpu) == (str(own), 2, True)
    assert Path(args.training_script) == Path(train.__file__)
    assert args.training_script_args == ["--config", config, "--seed", "1"]


def test_a_failed_script_gives_its_exit_code(monkeypatch):
    def fail(args):
        raise subprocess.CalledProcessError(returncode=2, cmd=["python"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert cli.main(["train", "--max_steps", "1"]) == 2


@pytest.mark.parametrize(
    ("config", "flags", "parts"),
    [
        ({"num_generation": 8}, [], ["key 'num_generation' of the config file", "'num_generations'"]),
        ({"num-mixed-generations": 8}, [], ["key 'num-mixed-generations'", "'num_mixed_generations'"]),
        ({"num_proceses": 8}, [], ["key 'num_proceses'", "'num_processes'"]),
        ({"accelerate_confg": "zero3"}, [], ["key 'accelerate_confg'", "'accelerate_config'"]),
        ({"zzzzqqqq": 1}, [], ["key 'zzzzqqqq'", "--help lists all"]),
        ({}, ["--expert_model", "x"], ["option '--expert_model'", "expert_model"]),
        ({}, ["--draft_len=3"], ["option '--draft_len'", "'draft_length'"]),
        ({}, ["stray"], ["unexpected argument 'stray'"]),
        ({}, ["--num_processes"], ["'--num_processes' needs a value"]),
        ({}, ["--num_generations", "many"], ["--num_generations", "'many'"]),
        ({"num_generations": 4.5}, [], ["'num_generations'", "invalid int value: '4.5'"]),
        ({"learning_rate": "fast"}, [], ["--learning_rate", "'fast'"]),
        ({"learning_rate": True}, [], ["'learning_rate'", "'True'"]),
        ({"dtype": "bfloat61"}, [], ["'dtype'", "'bfloat61'", "'bfloat16'"]),
        ({"accelerate_config": "zero9"}, [], ["zero9"]),
    ],
)
def test_mistakes_are_named_before_anything_is_launched(capsys, launched, tmp_path, config, flags, parts):
    error = error_of(capsys, ["train", "--config", write_config(tmp_path, **config), *flags])
    assert all(part in error for part in parts), error
    assert not launched


@pytest.mark.parametrize(
    ("content", "part"), [(None, "does not exist"), ("a: [", "not valid YAML"), ("- a", "key: value")]
)
def test_unusable_config_files_are_named(capsys, launched, tmp_path, content, part):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    error = error_of(capsys, ["train", "--config", str(path)])
    assert part in error and str(path) in error
    assert "needs the path" in error_of(capsys, ["train", "--config"])


def test_config_file_values_take_the_type_of_their_field(tmp_path):
    config = write_config(
        tmp_path,
        output_dir=str(tmp_path),
        learning_rate="1e-6",
        model_revision=1,
        reward_funcs="format_reward",
        reward_weights=1,
        resume_from_checkpoint=True,
        num_processes=8,
    )
    parser = train.make_parser()
    script_args, training_args, model_args, _ = parser.parse_args_and_config(
        [f"--config={config}", "--max_steps", "3", "--use_cpu", "--bf16", "false"], fail_with_unknown_args=False
    )
    assert script_args.reward_funcs == ["format_reward"]
    assert (training_args.learning_rate, training_args.max_steps) == (1e-6, 3)
    assert training_args.reward_weights == [1] and training_args.resume_from_checkpoint is True
    assert model_args.model_revision == "1"


def test_reward_funcs_by_name_and_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_module.py").write_text("def length(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = ["accuracy_reward", "format_reward", "think_format_reward", "my_rewards_module.length"]
    functions = train.resolve_reward_funcs(names)
    from trl.rewards import think_format_reward

    from mentor_trl.rewards import accuracy_reward, format_reward

    assert functions[:3] == [accuracy_reward, format_reward, think_format_reward]
    assert functions[3](["a"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("acuracy_reward", ["'acuracy_reward'", "did you mean 'accuracy_reward'?"]),
        ("no_such_module.reward", ["'no_such_module.reward'", "cannot be imported"]),
        ("textwrap.no_such_function", ["textwrap", "'no_such_function'", "'dedent'"]),
    ],
)
def test_unknown_reward_funcs_are_named(name, parts, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(train.UsageError) as error:
        train.resolve_reward_funcs([name])
    assert all(part in str(error.value) for part in parts), error.value


def parsed(tmp_path: Path, *flags: str):
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *flags]
    return train.make_parser().parse_args_and_config(argv)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["`reward_funcs`"]),
        (["--reward_funcs", "format_reward", "--reward_weights", "1", "2"], ["2 numbers for 1 reward"]),
        (["--reward_funcs", "format_reward", "--report_to", "swanlab"], ["swanlab", "pip install swanlab"]),
    ],
)
def test_options_that_would_fail_late_are_refused_early(tmp_path, monkeypatch, flags, parts):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    script_args, training_args, *_ = parsed(tmp_path, *flags)
    with pytest.raises(train.UsageError) as error:
        train.check_options(script_args, training_args)
    assert all(part in str(error.value) for part in parts), error.value


def test_checkpoint_to_resume_from(tmp_path):
    assert train.resolve_checkpoint(None, str(tmp_path)) is None
    assert train.resolve_checkpoint("false", str(tmp_path)) is None
    with pytest.raises(train.UsageError, match="holds no checkpoint-N folder"):
        train.resolve_checkpoint("true", str(tmp_path))
    with pytest.raises(train.UsageError, match="holds no checkpoint-N folder"):
        train.resolve_checkpoint(True, str(tmp_path / "absent"))
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert train.resolve_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert train.resolve_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")
    path = str(tmp_path / "checkpoint-2")
    assert train.resolve_checkpoint(path, "elsewhere") == path
    with pytest.raises(train.UsageError, match="not a folder"):
        train.resolve_checkpoint(str(tmp_path / "checkpoint-3"), str(tmp_path))


def train_argv(tmp_path: Path, model: Path, expert: Path, **changes) -> list[str]:
    rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(model),
        "expert_model_name_or_path": str(expert),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "dataset_prompt_column": "question",
        "dataset_solution_column": "answer",
        "dataset_solution_delimiter": "####",
        "reward_funcs": ["accuracy_reward", "format_reward"],
        "reward_weights": [0.9, 0.1],
        "output_dir": str(tmp_path / "out"),
        "num_generations": 4,
        "num_mixed_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **changes,
    }
    return ["--config", write_config(tmp_path, **config)]


def test_data_mistakes_end_in_one_line_before_the_trainer_exists(
    capsys, tmp_path, monkeypatch, tiny_model_dir, tiny_expert_dir
):
    monkeypatch.setattr(train, "_make_trainer", lambda *args: pytest.fail("the trainer was built"))
    argv = train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, dataset_prompt_column="query")
    with pytest.raises(SystemExit) as stop:
        train.run(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mentor-trl train: error: There is no column 'query'")


def test_mistakes_in_the_training_arguments_end_in_one_line(capsys, tmp_path, tiny_model_dir, tiny_expert_dir):
    with pytest.raises(SystemExit) as stop:
        train.run(train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, num_mixed_generations=3))
    assert stop.value.code == 2
    assert "`num_mixed_generations=3`" in capsys.readouterr().err.splitlines()[-1]


def test_training_saves_and_resumes(tmp_path, tiny_model_dir, tiny_expert_dir):
    assert train.run(train_argv(tmp_path, tiny_model_dir, tiny_expert_dir)) == 0
    out = tmp_path / "out"
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    resumed = train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, max_steps=2, resume_from_checkpoint=True)
    assert train.run(resumed) == 0
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
