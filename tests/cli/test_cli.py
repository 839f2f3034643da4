import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mentor_trl.cli import main as cli
from mentor_trl.cli import train
from mentor_trl.errors import SetupError
from mentor_trl.version import __version__


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


@pytest.mark.parametrize(
    ("argv", "code", "part"),
    [
        ([], 0, "mentor-trl COMMAND --help"),
        (["train", "--help"], 0, "--num_mixed_generations"),
        (["trian"], 2, "did you mean 'train'?"),
        (["train"], 2, "nothing is set: give --config FILE.yaml"),
        (["train", "--num_generations", "many"], 2, "invalid int value: 'many'"),
        (["train", "--config", "{config}", "--model_init_kwargs", '{"a": '], 2, "'--model_init_kwargs'"),
        (["health", "--help"], 0, "address of the server"),
        (["serve", "--help"], 0, "--policy"),
        (["eval", "--help"], 0, "--max_new_tokens"),
    ],
)
def test_what_needs_no_heavy_import(tmp_path, argv, code, part):
    config = write_config(tmp_path, learning_rate=1.0)
    run = f"""
import sys
from mentor_trl.cli.main import main
code = 0
try:
    code = main({[arg.replace("{config}", config) for arg in argv]!r})
except SystemExit as stop:
    code = stop.code
heavy = {{"torch", "datasets", "peft", "transformers.training_args", "trl.trainer.grpo_config"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert part in " ".join((done.stdout + done.stderr).split())


def test_a_wrong_name_needs_no_trainer(tmp_path):
    config = write_config(tmp_path, lerning_rate=1.0)
    run = f"""
import sys
from mentor_trl.cli.main import main
try:
    main(["train", "--config", {config!r}])
except SystemExit as stop:
    assert stop.code == 2
assert not {{"transformers.training_args", "peft", "trl.trainer.grpo_config"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'lerning_rate' of the config file: did you mean 'learning_rate'" in done.stderr


def test_the_options_read_from_sources_are_those_of_the_script():
    light, real = ({a.dest: a for a in train.make_parser(light=light)._actions} for light in (True, False))
    assert list(light) == list(real)
    for name, action in real.items():
        for attribute in ("option_strings", "nargs", "const", "default", "help", "required"):
            assert getattr(light[name], attribute) == getattr(action, attribute), (name, attribute)
        assert light[name].choices in (None, action.choices), name
    numbers = {name for name, action in real.items() if action.type in (int, float)}
    assert numbers and all(light[name].type is real[name].type for name in numbers)
    assert train.make_parser(light=True)._sections == train.make_parser()._sections


def test_version_names_the_base(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"<{name}>")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    base = "(trl <trl>, transformers <transformers>, torch <torch>)"
    assert capsys.readouterr().out == f"mentor-trl {__version__} {base}\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["data", "mth"], "unknown command 'mth': did you mean 'math'?"),
        (["zzz", "--help"], "unknown command 'zzz': there are init, train, data,"),
    ],
)
def test_unknown_commands(capsys, argv, part):
    assert part in error_of(capsys, argv)


def test_help_names_types_and_defaults_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 80
    for option in (
        "--alpha FLOAT",
        "--num_generations INT",
        "--bf16 BOOL",
        "--dtype CHOICE",
        "--reward_funcs TEXT ...",
    ):
        assert f"\n  {option} " in text.replace("\n    ", " \n    "), option
    words = " ".join(text.split())
    assert "(default: 1.0)" in words and "One of auto, bfloat16, float16, float32. (default: float32)" in words
    assert "(default: None)" not in words and "[`~" not in words


COMPLETED = {
    "tr": "train",
    "train --num_mix": "--num_mixed_generations",
    "train --num_proc": "--num_processes",
    "train --use_cpu f": "false",
    "train --config ": "",  # the shell's own completion of files
    "data cust": "custom",
    "data math --solution_d": "--solution_delimiter",
    "eval --backend s": "server",
    "serve --poli": "--policy",
    "completion b": "bash",
}


def test_completion_in_bash(capsys):
    assert cli.main(["completion", "bash"]) == 0
    lines = [capsys.readouterr().out]
    for line in COMPLETED:
        words = ["mentor-trl", *line.split(" ")]
        lines.append(f"COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}); COMP_CWORD={len(words) - 1}")
        lines.append('_mentor_trl; echo "${COMPREPLY[*]}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stderr == ""
    assert dict(zip(COMPLETED, done.stdout.split("\n"))) == COMPLETED


def test_help_of_train_has_every_field_once_and_ours_first(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
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


def test_what_accelerate_refuses_is_one_line(capsys):
    assert cli.main(["train", "--cpu", "--multi_gpu", "--max_steps", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.py cannot be launched: You can only use one of `--cpu`" in line


@pytest.mark.parametrize(
    ("config", "flags"),
    [({}, ["--cpu"]), ({"cpu": True}, []), ({"use_cpu": True}, [])],
    ids=["flag", "cpu", "use_cpu"],
)
def test_processes_on_the_cpu(tmp_path, monkeypatch, config, flags):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = write_config(tmp_path, output_dir=str(tmp_path), bf16=False, **config)
    assert cli.main(["train", "--config", config, "--num_processes", "2", *flags]) == 0
    (args,) = seen
    assert args.multi_gpu and not args.cpu and os.environ["ACCELERATE_USE_CPU"] == "true"
    parser = train.make_parser()
    assert parser.parse_args_and_config(args.training_script_args, fail_with_unknown_args=False)[1].use_cpu


@pytest.mark.parametrize(
    ("flags", "told", "accelerator", "threads"),
    [
        ("", None, False, 6),
        ("--cpu --num_processes 2", None, False, 3),
        ("--cpu --num_processes 8", None, False, 1),
        ("--num_cpu_threads_per_process 2", None, False, 2),
        ("", "4", False, None),  # accelerate reads it
        ("", None, True, None),
    ],
)
def test_a_run_on_the_cpu_has_all_cores(flags, told, accelerator, threads, monkeypatch):
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": told})
    if told is None:
        del os.environ["OMP_NUM_THREADS"]
    assert cli.main(["train", "--max_steps", "1", *flags.split()]) == 0
    assert seen[0].num_cpu_threads_per_process == threads


def test_processes_without_an_accelerator_are_not_dropped_silently(capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert cli.main("train --num_processes 2 --max_steps 1".split()) == 2
    assert "`num_processes` is 2, but this machine has no accelerator; add --cpu" in capsys.readouterr().err


SCRIPT = """
import os, sys, time
from pathlib import Path
folder, size = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
Path(folder, os.environ.get("RANK", "0")).write_text(f"{os.getpid()} {size}")
while not all(Path(folder, str(rank)).exists() for rank in range(size)):
    time.sleep(0.1)
time.sleep(float(sys.argv[2]))
sys.exit(2)
"""


def launch(tmp_path: Path, options: list[str], seconds: float) -> subprocess.Popen:
    """The launcher with a script of ours, which tells its process and leaves with code 2."""
    (tmp_path / "script.py").write_text(SCRIPT)
    call = [str(tmp_path / "script.py"), ["--main_process_port", "0", *options], [str(tmp_path), str(seconds)]]
    code = f"import sys; from mentor_trl.cli.main import launch_script; sys.exit(launch_script(*{call!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("options", [["--cpu"], ["--cpu", "--num_processes", "2"]], ids=["one", "two"])
def test_a_request_to_end_reaches_the_script(tmp_path, options):
    ranks = ["0", "1"][: len(options) // 2 + 1]
    with launch(tmp_path, options, 600) as process:
        try:
            deadline = time.monotonic() + 120
            while not all((tmp_path / rank).exists() for rank in ranks):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(0.5)
            process.terminate()
            assert process.wait(timeout=60) == 143
        finally:
            process.kill()
    for rank in ranks:
        assert not psutil.pid_exists(int((tmp_path / rank).read_text().split()[0]))


def test_a_script_that_fails_has_the_last_word(tmp_path):
    with launch(tmp_path, ["--cpu"], 0) as process:
        assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 2


def test_several_processes_on_the_cpu_and_their_exit_code(tmp_path):
    with launch(tmp_path, ["--cpu", "--num_processes", "2"], 0) as process:
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "ChildFailedError" not in error and "Root Cause" not in error
    assert {(tmp_path / rank).read_text().split()[1] for rank in "01"} == {"2"}


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
        ({"model_init_kwargs": "{dtype"}, [], ["option '--model_init_kwargs' is '{dtype'", "no JSON"]),
        ({}, ["--lr_scheduler_kwargs", "[1]"], ["option '--lr_scheduler_kwargs' is '[1]'"]),
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


def test_a_colocated_engine_needs_vllm(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--reward_funcs", "format_reward", "--report_to", "none", "--use_vllm", "true", "--vllm_mode"]
    with pytest.raises(train.UsageError, match=r"which is not installed; run `pip install 'mentor-trl\[vllm"):
        train.check_options(*parsed(tmp_path, *flags, "colocate")[:2])
    train.check_options(*parsed(tmp_path, *flags, "server")[:2])


def test_checkpoint_to_resume_from(tmp_path):
    assert train.resolve_checkpoint(None, str(tmp_path)) is None
    assert train.resolve_checkpoint("false", str(tmp_path)) is None
    with pytest.raises(train.UsageError, match="holds no checkpoint-N folder"):
        train.resolve_checkpoint("true", str(tmp_path))
    with pytest.raises(train.UsageError, match="holds no checkpoint-N folder"):
        train.resolve_checkpoint(True, str(tmp_path / "absent"))
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    assert train.resolve_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    path = str(tmp_path / "checkpoint-2")
    assert train.resolve_checkpoint(path, "elsewhere") == path
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-10 is passed over: trainer_state.json is missing"):
        assert train.resolve_checkpoint(True, str(tmp_path)) == path
    with pytest.raises(SetupError, match="checkpoint-3 cannot be resumed: there is no such folder"):
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


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"model_name_or_path": "{tmp}/none"},
            ["`model_name_or_path` is '{tmp}/none'", "no folder {tmp}/none"],
        ),
        ({"expert_model_name_or_path": "{tmp}/none"}, ["`expert_model_name_or_path='{tmp}/none'`"]),
        ({"output_dir": "{tmp}/rows.jsonl/out"}, ["`output_dir` is {tmp}/rows.jsonl/out", "cannot be written"]),
        ({"model_init_kwargs": {"colour": 1}}, ["cannot be built with these options", "'colour'"]),
        ({"deepspeed": "{tmp}/none.json"}, ["none.json"]),
    ],
)
def test_what_cannot_be_loaded_or_written_is_one_line(
    capsys, tmp_path, tiny_model_dir, tiny_expert_dir, changes, parts
):
    fill = lambda text: text.replace("{tmp}", str(tmp_path)) if isinstance(text, str) else text
    changes = {name: fill(value) for name, value in changes.items()}
    with pytest.raises(SystemExit) as stop:
        train.run(train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, **changes))
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()[-2:]
    assert usage.startswith("usage:") and all(fill(part) in error for part in parts), error


def test_mistakes_in_the_training_arguments_end_in_one_line(capsys, tmp_path, tiny_model_dir, tiny_expert_dir):
    with pytest.raises(SystemExit) as stop:
        train.run(train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, num_mixed_generations=3))
    assert stop.value.code == 2
    assert "`num_mixed_generations=3`" in capsys.readouterr().err.splitlines()[-1]


def test_training_saves_and_resumes(tmp_path, tiny_model_dir, tiny_expert_dir, capsys):
    assert train.run(train_argv(tmp_path, tiny_model_dir, tiny_expert_dir)) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.endswith(f"Model saved to {out}.\n")
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    resumed = train_argv(
        tmp_path, tiny_model_dir, tiny_expert_dir, max_steps=2, resume_from_checkpoint=True, log_rollout_records=1
    )
    assert train.run(resumed) == 0
    assert capsys.readouterr().out.endswith(f"\nLook at a rollout: mentor-trl plot rollout {out}\n")
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
