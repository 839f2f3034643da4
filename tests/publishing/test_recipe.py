from enum import Enum

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from mentor_trl import MentorGRPOTrainer, accuracy_reward
from mentor_trl.cli import train
from mentor_trl.errors import SetupError
from mentor_trl.publishing.recipe import save, without_secrets
from trainer_helpers import letters_reward, make_trainer, prompts


TOKEN = "hf_" + "a" * 34


class Choice(Enum):
    ONE = "one"


def test_secrets_and_places_stay_here():
    options = {
        "env": {"WANDB_API_KEY": "abc"},
        "hub_token": "short",
        "run_name": f"run {TOKEN}",
        "dataset_name": "https://ada:pw@example.org/rows.jsonl",
        "model_init_kwargs": {"token": "abc", "attn": {"api_key": 1, "x": 2}},
        "vllm_server_base_url": "http://10.0.0.1:8000",
        "expert_base_url": "http://10.0.0.2:8000",
        "expert_model_name_or_path": "/home/ada/experts/big",
        "output_dir": "~/runs/mentor",
        "datasets": [{"path": "/data/rows.jsonl", "token": "abc"}],
    }
    kept, left_out = without_secrets(options, publish=True)
    assert kept == {
        "model_init_kwargs": {"attn": {"x": 2}},
        "expert_model_name_or_path": "big",
        "output_dir": "mentor",
        "datasets": [{"path": "rows.jsonl"}],
    }
    assert {"env", "hub_token", "run_name", "dataset_name", "model_init_kwargs.token"} <= set(left_out)
    assert "model_init_kwargs.attn.api_key" in left_out and "datasets.token" in left_out
    assert options["hub_token"] == "short"  # the run keeps what it was given
    kept, left_out = without_secrets(options)  # what stays here
    assert kept["output_dir"] == "~/runs/mentor" and kept["datasets"] == [{"path": "/data/rows.jsonl"}]
    assert kept["vllm_server_base_url"] == "http://10.0.0.1:8000" and "hub_token" in left_out


def test_what_is_no_secret_stays(tmp_path):
    options = {
        "extend_stop_tokens": True,
        "average_tokens_across_devices": False,
        "hub_token": None,
        "system_prompt": "/think\nstep by step",
        "model_name_or_path": "Qwen/Qwen2.5-3B",
        "learning_rate": 1e-6,
        "hub_strategy": Choice.ONE,
        "model_init_kwargs": '{"a": 1}',
        "reward_weights": (0.9, 0.1),
    }
    kept = {**options, "hub_strategy": "one", "model_init_kwargs": {"a": 1}, "reward_weights": [0.9, 0.1]}
    assert without_secrets(options, publish=True) == without_secrets(options) == (kept, [])
    assert yaml.safe_load(save(options, tmp_path).read_text()) == kept
    assert yaml.safe_load((tmp_path / "assets" / "recipe.yaml").read_text()) == kept


def test_a_recipe_starts_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "env: {A: b}\nnum_processes: 1\nlearning_rate: 1e-6\nreward_funcs: format_reward\nseed: 1\nmax_steps: 3\n"
        "generation_batch_size: 16\nhub_token: secret\nbf16: true\n"
    )
    out = tmp_path / "out"
    argv = f"--config config.yaml --seed 7 --output_dir={out} --use_cpu --bf16 false --hub_strategy end".split()
    argv += ["--model_init_kwargs", '{"dtype": "float32"}']
    parser = train.make_parser()
    first = parser.parse_args_and_config(argv, fail_with_unknown_args=False)
    options = parser.given_options(argv)
    assert set(options) == {
        *("num_processes", "learning_rate", "reward_funcs", "seed", "max_steps", "generation_batch_size", "hub_token"),
        *("bf16", "output_dir", "use_cpu", "model_init_kwargs", "hub_strategy"),
    }
    path = save(options | {"resume_from_checkpoint": True}, "out")
    assert "# Left out: hub_token\n" in path.read_text()
    again = train.make_parser().parse_args_and_config(["--config", str(path)], fail_with_unknown_args=False)
    for one, other in zip(first, again):
        one, other = (vars(args) | {"hub_token": None} for args in (one, other))
        skip = {"distributed_state", "deepspeed_plugin", "accelerator_config", "_given"}
        assert {k: v for k, v in one.items() if k not in skip} == {k: v for k, v in other.items() if k not in skip}
    # Parsing for the recipe changes nothing of the parser
    assert parser.parse_args_and_config(["--output_dir", "x", "--use_cpu", "--bf16", "false"])[1].seed == 1


def test_a_script_leaves_its_model_and_a_recipe(tmp_path, tiny_model_dir, tiny_expert_dir):
    trainer = make_trainer(
        tmp_path / "out",
        model=str(tiny_model_dir),
        reward_funcs=[letters_reward, accuracy_reward],
        train_dataset=prompts(8).add_column("solution", ["2"] * 8),
        expert_model_name_or_path=str(tiny_expert_dir),
        hub_token="secret",
        save_strategy="steps",
        max_steps=1,
    )
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all((saved[name] == value).all() for name, value in trainer.model.state_dict().items())
    path = tmp_path / "out" / "recipe.yaml"
    text, options = path.read_text(), yaml.safe_load(path.read_text())
    assert "set `dataset_name` first" in text and "# Left out: hub_token\n" in text and "secret" not in text
    assert options["model_name_or_path"] == str(tiny_model_dir) and options["learning_rate"] == 1e-2
    assert options["reward_funcs"] == ["trainer_helpers.letters_reward", "accuracy_reward"]
    again = train.make_parser().parse_args_and_config(["--config", str(path)], fail_with_unknown_args=False)[1]
    for name in ("max_steps", "num_generations", "expert_model_name_or_path", "generation_batch_size", "use_cpu"):
        assert getattr(again, name) == getattr(trainer.args, name), name


def test_without_arguments_one_sentence_says_what_to_give(tiny_model_dir, tiny_expert_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    rows = Dataset.from_dict({"prompt": ["1+1="]})
    with pytest.raises(SetupError, match='pass `expert="MODEL"`, or `args=MentorGRPOConfig') as caught:
        MentorGRPOTrainer(str(tiny_model_dir), letters_reward, train_dataset=rows)
    assert str(caught.value).count(".") == 1
    trainer = MentorGRPOTrainer(str(tiny_model_dir), letters_reward, train_dataset=rows, expert=str(tiny_expert_dir))
    assert trainer.args.output_dir == f"{tiny_model_dir.name}-MENTOR" and trainer.args.bf16 is False
