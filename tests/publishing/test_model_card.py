import json
from pathlib import Path

import pytest
from datasets import Dataset
from evaluation.test_summary import make_results
from huggingface_hub import ModelCard

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.errors import SetupError
from mentor_trl.publishing import card as model_card
from mentor_trl.publishing.card import link
from trainer_helpers import letters_reward, make_trainer


@pytest.fixture
def trained(tmp_path):
    trainer = make_trainer(tmp_path / "mentor", num_mixed_generations=3)
    trainer.train()
    return trainer


def read_card(trainer) -> ModelCard:
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_sections_stand_in_order(trained):
    pytest.importorskip("matplotlib")
    trained.recipe = {"dataset_name": "openai/gsm8k", "dataset_config": "main", "hub_token": "hf_secret", "seed": 3}
    trained.create_model_card(model_name="mentor")
    text = read_card(trained).text
    parts = ["The expert was", "### Settings", "### Training curves", "### Recipe", "### Framework versions"]
    positions = [text.index(part) for part in [*parts, "## Citations"]]
    assert positions == sorted(positions)
    assert "| dataset | `openai/gsm8k` |" in text and "[assets/recipe.yaml](assets/recipe.yaml)" in text
    assert "hf_secret" not in text and "None](" not in text
    for name in ("training", "guidance"):
        picture = (trained.args.output_dir) + f"/assets/{name}.png"
        assert f"(assets/{name}.png)" in text
        with open(picture, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    again = text
    trained.create_model_card(model_name="mentor")  # as at the next checkpoint
    assert read_card(trained).text == again


def settings_of(trainer, **kwargs) -> dict[str, str]:
    trainer.create_model_card(**kwargs)
    table = read_card(trainer).text.partition("### Settings")[2].partition("### ")[0]
    return dict(line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| "))


def test_settings_are_those_of_the_run(tmp_path):
    trainer = make_trainer(
        tmp_path,
        reward_funcs=[letters_reward, letters_reward],
        reward_weights=[0.9, 0.1],
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_mixed_generations=3,
        entropy_quantile=0.9,
        alpha=0.5,
        expert_decay_steps=7,
        correction="clip",
        correction_floor=0.3,
        correction_cap=2.0,
        lr_scheduler_type="constant",
        epsilon_high=0.28,
    )
    found = settings_of(trainer, dataset_name="openai/gsm8k")
    expected = {
        "num_generations": "`8`",
        "num_mixed_generations": "`3`",
        "generation_batch_size": "`32`",
        "branch_rule": "`entropy`",
        "entropy_quantile": "`0.9`",
        "alpha": "`0.5`",
        "alpha_schedule": "`cosine`",
        "expert_decay_steps": "`7`",
        "correction": "`clip`",
        "correction_floor": "`0.3`",
        "rewards (weights)": "`letters_reward (0.9), letters_reward (0.1)`",
        "epsilon_high": "`0.28`",
        "lr_scheduler_type": "`constant`",
        "optimizer steps": "`0`",
        "dataset": "`openai/gsm8k`",
    }
    assert expected.items() <= found.items()
    assert "entropy_threshold" not in found  # not set


def test_a_local_dataset_is_named_without_its_folder(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.recipe = {"dataset_name": str(tmp_path / "rows.jsonl")}
    assert settings_of(trainer)["dataset"] == "`rows.jsonl, local`"


def test_saves_draw_nothing_but_for_a_push(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(model_card, "save_figure", lambda figure, path: drawn.append(path.name))
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert drawn == [] and (tmp_path / "checkpoint-2").exists() and "### Settings" in read_card(trainer).text
    trainer.create_model_card(model_name="mentor")
    assert drawn == ["training.png", "guidance.png"]


def test_no_picture_is_worth_a_push(trained, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("mentor_trl.publishing.card.plot_training", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(UserWarning, match="training.png of the model card could not be drawn: ZeroDivisionError"):
        trained.create_model_card(model_name="mentor")
    text = read_card(trained).text
    assert "training.png" not in text and "assets/guidance.png" in text and "### Framework versions" in text


def test_without_matplotlib_there_are_no_curves(trained, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trained.create_model_card(model_name="mentor")
    assert "### Settings" in read_card(trained).text and "curves" not in read_card(trained).text


def test_before_anything_is_logged_there_are_no_curves(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(model_name="mentor")
    assert "### Settings" in read_card(trainer).text and "curves" not in read_card(trainer).text


def test_plain_grpo_keeps_the_card_of_trl(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", num_mixed_generations=0, max_steps=1)
    trainer.train()
    trainer.recipe = {"seed": 3}
    trainer.create_model_card(model_name="m", dataset_name="openai/gsm8k", tags=["a"])
    ours = (tmp_path / "run" / "README.md").read_bytes()
    monkeypatch.setattr("mentor_trl.trainer.complete_card", lambda *args, **kwargs: None)
    trainer.create_model_card(model_name="m", dataset_name="openai/gsm8k", tags=["a"])
    theirs = (tmp_path / "run" / "README.md").read_bytes().replace(b'model="None"', b'model="run"')
    assert sorted(ours.splitlines()) == sorted(theirs.splitlines())  # tags are a set
    assert [path.name for path in (tmp_path / "run" / "assets").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("chat", [True, False])
def test_the_quick_start_runs(chat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = None if chat else Dataset.from_dict({"prompt": ["abc", "bcd"] * 4})
    expert = {"expert_processing_class": make_tiny_tokenizer(chat)}
    given = {"processing_class": make_tiny_tokenizer(chat), "train_dataset": data, "trainer_kwargs": expert}
    make_trainer("sub/run", max_steps=1, save_strategy="steps", **given).train()
    text = Path("sub/run/README.md").read_text()
    assert 'model="sub/run"' in text
    exec(text.partition("```python\n")[2].partition("```")[0].replace("128", "4"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("mixed", [0, 3])
@pytest.mark.parametrize("form", ["dict", "file", "folder"])
def test_results_on_request(tmp_path, mixed, form):
    trainer = make_trainer(tmp_path / "run", num_mixed_generations=mixed)
    results = make_results()
    (tmp_path / "results.json").write_text(json.dumps(results))
    given = {"dict": results, "file": tmp_path / "results.json", "folder": str(tmp_path)}[form]
    trainer.create_model_card(model_name="mine", results=given)
    card = read_card(trainer)
    found = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in card.data.eval_results}
    assert found == {("AIME24", "avg@32"): 34.38, ("AIME24", "pass@32"): 66.67, ("MATH500", "pass@1"): 66.67}
    assert card.data.model_name == "mine" and "| MATH500 | pass@1 | 66.67 |" in card.text
    assert ("### Settings" in card.text) == bool(mixed)


def test_results_that_are_not_there(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    with pytest.raises(SetupError, match="There are no results .*absent"):
        trainer.create_model_card(results=tmp_path / "absent")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(SetupError, match="results.json is not valid JSON"):
        trainer.create_model_card(results=tmp_path)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card(results=tmp_path / "absent")
    assert not (tmp_path / "run" / "README.md").exists()


def test_models_as_the_card_names_them(tmp_path, monkeypatch):
    assert link("org/model") == "[org/model](https://huggingface.co/org/model)"
    assert link("/home/ada/big") == "`big`, a local model" and link("./a") == "`a`, a local model"
    assert link(None) == link("") == "a model that names no origin"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experts" / "big").mkdir(parents=True)
    assert link("experts/big") == "`big`, a local model"


def test_a_base_on_the_hub_is_linked_as_trl_does(tmp_path):
    model = make_tiny_model(seed=0)
    model.config._name_or_path = "org/base"
    expert = {"expert": make_tiny_model(seed=1), "expert_processing_class": make_tiny_tokenizer()}
    trainer = make_trainer(tmp_path, model=model, trainer_kwargs=expert)
    trainer.create_model_card(model_name="m")
    card = read_card(trainer)
    assert card.data.base_model == "org/base" and "[org/base](https://huggingface.co/org/base)" in card.text
