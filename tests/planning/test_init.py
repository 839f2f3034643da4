import json

import pytest
import yaml
from test_recipes import BLOCKS, check_command, commands, header, parse, read

from helpers import make_letter_tokenizer, make_tiny_model
from mentor_trl.cli import main as cli
from mentor_trl.cli import train


GPU = ["--gpus", "1", "--gpu_memory", "80"]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_dir, tiny_expert_dir):
    """A folder with a newcomer's files, in which commands run."""
    (tmp_path / "policy").symlink_to(tiny_model_dir)
    (tmp_path / "expert").symlink_to(tiny_expert_dir)
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(3) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


def flags(**changes: str | None) -> list[str]:
    options = {"policy": "policy", "expert": "expert", "dataset_name": "rows.jsonl"} | changes
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]


def start(*argv: str) -> int:
    return cli.main(["init", *argv])


@pytest.mark.parametrize("machine", [[], GPU, ["--gpus", "3", "--gpu_memory", "24"]], ids=["cpu", "gpu", "gpus"])
@pytest.mark.parametrize("method", ["mentor", "grpo", "opd", "gats", "distilled_rl", "served"])
def test_what_is_written_is_a_recipe(place, capsys, method, machine):
    options = {"method": method, "expert": None if method == "grpo" else "expert"}
    if method == "served":
        options |= {"method": "mentor", "expert_base_url": "http://127.0.0.1:9"}
    assert start(*flags(**options), *machine) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "Wrote mentor.yaml" in out and " NO" not in out
    path = place / "mentor.yaml"
    text, config = path.read_text(), read(path)
    assert max(map(len, text.splitlines())) <= 119
    positions = [text.index(block + "\n") for block in BLOCKS]
    for first, end in zip(positions, [*positions[1:], len(text)]):
        keys = list(yaml.safe_load(text[first:end]))
        assert keys == sorted(keys)
    assert all(line.startswith("#") for line in header(path).splitlines())
    launched = commands(header(path))
    assert ["train", "--config", "mentor.yaml"] in launched
    for words in launched:
        check_command(words)
    script_args, args, model_args, _ = parse(path)
    assert (config["learning_rate"], args.learning_rate) == (1e-4, 1e-4)
    assert (args.num_mixed_generations > 0) == (method in ("mentor", "gats", "served"))
    assert args.distillation == (method if method in ("opd", "gats", "distilled_rl") else "none")
    expert = args.expert_base_url or args.expert_model_name_or_path
    assert expert == {"grpo": None, "served": "http://127.0.0.1:9"}.get(method, "expert")
    assert len(train.resolve_reward_funcs(script_args.reward_funcs)) == len(args.reward_weights)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * config.get("num_processes", 1)
    assert rows % args.num_generations == 0 and rows // args.num_generations <= 9
    if machine:
        assert config["bf16"] and config["num_processes"] == int(machine[1]) and "use_cpu" not in config
        assert config["accelerate_config"] == ("multi_gpu" if machine[1] == "3" else "single_gpu")
    else:
        assert config["use_cpu"] and config["bf16"] is False and "accelerate_config" not in config


def test_what_was_found_is_in_the_table(place, capsys):
    assert start(*flags()) == 0
    lines = {line[:13].strip(): line[15:].rstrip() for line in capsys.readouterr().out.splitlines()[1:11]}
    assert all(line.endswith(" ok") for line in lines.values())
    assert lines["vocabulary"].startswith("the same 64 tokens ") and lines["stop tokens"].startswith("<eos> ")
    assert lines["data"].startswith("9 prompts (question and answer) ")
    assert "accuracy_reward, format_reward; 9 solutions" in lines["rewards"]
    assert read(place / "mentor.yaml")["per_device_train_batch_size"] == 8


def test_columns_rewards_and_lengths_of_ones_own(place):
    (place / "rows.jsonl").write_text(json.dumps({"text": "1+1=", "right": ["2"]}) + "\n")
    (place / "my_rewards.py").write_text("def short(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    own = {"dataset_prompt_column": "text", "reward_funcs": "my_rewards.short", "system_prompt": "none"}
    assert start(*flags(**own, max_completion_length="40", output="sub/own.yaml", output_dir="there")) == 0
    config = read(place / "sub" / "own.yaml")
    assert config["reward_funcs"] == ["my_rewards.short"] and config["reward_weights"] == [1.0]
    assert config["dataset_prompt_column"] == "text" and "dataset_solution_column" not in config
    assert config["max_completion_length"] == 40 and config["output_dir"] == "there" and "system_prompt" not in config
    assert config["gradient_accumulation_steps"] == 1  # there is one prompt


def test_completions_fit_the_context(place):
    make = make_tiny_model()
    make.config.max_position_embeddings = 400
    make.save_pretrained(place / "short")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / "short" / file).write_bytes((place / "policy" / file).read_bytes())
    assert start(*flags(policy="short")) == 0
    assert 16 <= read(place / "mentor.yaml")["max_completion_length"] < 128


def test_stop_tokens_of_the_expert_are_added(place):
    model = make_tiny_model(seed=1)
    model.generation_config.eos_token_id = [2, 6]
    model.save_pretrained(place / "chatty")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / "chatty" / file).write_bytes((place / "expert" / file).read_bytes())
    assert start(*flags(expert="chatty")) == 0
    assert read(place / "mentor.yaml")["extend_stop_tokens"] is True


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"policy": None}, "No policy is given; set --policy"),
        ({"dataset_name": None}, "No data are given; set --dataset_name"),
        ({"expert": None}, "No expert is given; set --expert"),
        ({"method": "grpo"}, "`--method grpo` has no expert"),
        ({"method": "grop"}, "invalid choice: 'grop'"),
        ({"policy": "plicy"}, "The policy 'plicy' cannot be read: there is no folder plicy"),
        ({"expert": "bare"}, "The expert 'bare' has no tokenizer"),
        ({"dataset_name": "row.jsonl"}, "did you mean rows.jsonl?"),
        ({"dataset_prompt_column": "text"}, "There is no column 'text'"),
        ({"dataset_solution_column": "right"}, "There is no column 'right'"),
        ({"dataset_train_split": "test"}, "has no split 'test'"),
        ({"output": "rows.jsonl"}, "rows.jsonl exists; choose another --output, or replace it with --force"),
        ({"gpus": "2"}, "say it: --gpu_memory 80"),
        ({"max_completion_length": "0"}, "`max_completion_length` is 0"),
    ],
)
def test_mistakes_are_one_line(place, capsys, changes, part):
    make_tiny_model().save_pretrained(place / "bare")
    with pytest.raises(SystemExit) as stop:
        start(*flags(**changes))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("mentor-trl init: error: ") and part in error, error
    assert not (place / "mentor.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "what", "advice"),
    [
        ({"expert": "letters"}, "vocabulary", "choose an expert of the policy's family"),
        ({"max_completion_length": "2000"}, "context", "lower `max_completion_length` to"),
        ({"dataset_name": "ungradable.jsonl"}, "rewards", "--reward_funcs my_module.my_reward"),
        ({"gpus": "1", "gpu_memory": "0.87"}, "memory", "use a larger GPU"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_written(place, capsys, changes, what, advice):
    make_tiny_model(vocab_size=64).save_pretrained(place / "letters")
    make_letter_tokenizer("".join(map(chr, range(200, 264)))).save_pretrained(place / "letters")
    (place / "ungradable.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "???"}) + "\n")
    with pytest.raises(SystemExit) as stop:
        start(*flags(**changes))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and f"{what}: does not fit, as said above; nothing was written" in error
    assert f"NO: {what}: " in out and advice in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80 and not (place / "mentor.yaml").exists()


def test_a_server_that_does_not_answer_is_a_note(place, capsys):
    assert start(*flags(expert_base_url="http://127.0.0.1:9")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "note: expert's server: Start it, or correct the address" in out
    text = (place / "mentor.yaml").read_text()
    assert "vllm serve expert --logprobs-mode processed_logprobs" in text and "--port 9" in text
    assert "branch_rule: random" in text and "expert_model_name_or_path" not in text


def test_force_replaces_the_file(place):
    (place / "mentor.yaml").write_text("old")
    assert start(*flags(), "--force") == 0 and "old" not in (place / "mentor.yaml").read_text()
