"""Pushing to the Hub, against a stand-in for its API that keeps the files that each call would send."""

from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
import torch
import transformers
import yaml
from cli.test_cli import train_argv
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from mentor_trl.cli import train
from mentor_trl.errors import SetupError
from mentor_trl.publishing import hub
from mentor_trl.publishing.hub import make_repository, withheld
from mentor_trl.rollout.serving.generation import weights_root
from trainer_helpers import make_trainer


TOKEN = "hf_" + "x" * 34
MODEL = {"model.safetensors", "config.json", "generation_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CARD = {"README.md", "assets/training.png", "assets/guidance.png"}


class Hub:
    """Calls and files of the stand-in."""

    def __init__(self):
        self.created: list[tuple[str, dict]] = []
        self.pushes: list[dict] = []
        self.error: Exception | None = None

    def create_repo(self, api, repo_id, **kwargs):
        if self.error:
            raise self.error
        self.created.append((repo_id, kwargs))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def upload_folder(self, api, *, folder_path, ignore_patterns=None, run_as_future=False, **kwargs):
        if self.error:
            raise self.error
        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = set(filter_repo_objects(paths, ignore_patterns=ignore_patterns))
        files = {path: Path(folder_path, path).read_bytes() for path in kept}
        self.pushes.append({"folder": Path(folder_path), "files": files, "future": run_as_future, **kwargs})
        commit = CommitInfo("https://huggingface.co/me/x/commit/0", commit_message="m", commit_description="", oid="0")
        if not run_as_future:
            return commit
        done = Future()
        done.set_result(commit)
        return done


@pytest.fixture
def stand_in(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: made.create_repo(*args, **kwargs))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **kwargs: made.upload_folder(*args, **kwargs))
    return made


def test_training_from_the_command_line_pushes_all_that_tells_about_the_model(
    stand_in, tmp_path, tiny_model_dir, tiny_expert_dir
):
    pytest.importorskip("matplotlib")
    settings = {"push_to_hub": True, "hub_model_id": "me/mentor", "hub_private_repo": True, "hub_strategy": "end"}
    argv = train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, **settings, log_completions=True, max_steps=2)
    argv += ["--log_rollout_records", "2", "--hub_token", TOKEN]
    assert train.run(argv) == 0
    # Before the models are loaded, and by the Trainer
    assert stand_in.created == [("me/mentor", {"token": TOKEN, "private": True, "exist_ok": True})] * 2
    (push,) = stand_in.pushes
    assert push["files"].keys() == MODEL | TOKENIZER | CARD | {"assets/recipe.yaml"}
    assert (push["repo_id"], push["token"], push["future"]) == ("me/mentor", TOKEN, False)
    assert push["folder"] == tmp_path / "out" and push["commit_message"] == "End of training"
    assert not [name for name, content in push["files"].items() if TOKEN.encode() in content]
    for trace in ("rollouts", "completions", "log.jsonl", "checkpoint-1", "training_args.bin"):
        assert (tmp_path / "out" / trace).exists()
    card = ModelCard(push["files"]["README.md"].decode())
    assert "![Training dynamics" in card.text and "### Recipe" in card.text
    assert card.data.get("datasets") is None  # a local file
    published = yaml.safe_load(push["files"]["assets/recipe.yaml"])
    assert published["log_rollout_records"] == 2 and "hub_token" not in published
    assert not [name for name, content in push["files"].items() if str(tmp_path).encode() in content]
    # Here it names the folders, so that it starts the run again
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["dataset_name"] == str(tmp_path / "rows.jsonl") and recipe["output_dir"] == str(tmp_path / "out")
    assert "hub_token" not in recipe


def test_what_is_pushed_can_be_loaded(stand_in, tmp_path):
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    trainer.train()
    trainer.push_to_hub(dataset_name="openai/gsm8k")
    (push,) = stand_in.pushes
    for name, content in push["files"].items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "copy")("a")["input_ids"] == trainer.processing_class("a").input_ids
    )
    assert ModelCard.load(tmp_path / "copy" / "README.md").data.datasets == "openai/gsm8k"
    assert "training_args.bin" in push["files"]  # no token, no secret


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_pushes_while_training(stand_in, tmp_path, strategy):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "log_completions": True}
    settings |= {"log_rollout_records": 2, "push_to_hub": True, "hub_token": TOKEN, "hub_strategy": strategy}
    folder = tmp_path / "out"
    make_trainer(folder, **settings).train()
    assert stand_in.created == [("out", {"token": TOKEN, "private": None, "exist_ok": True})]
    models = [push for push in stand_in.pushes if push["folder"] == folder]
    states = [push for push in stand_in.pushes if push["folder"] != folder]
    assert [push["commit_message"] for push in models] == [f"Training in progress, step {step}" for step in (1, 2)]
    for push in models:
        assert push["future"] and MODEL | TOKENIZER | {"README.md"} <= push["files"].keys()
        assert push["files"].keys() <= MODEL | TOKENIZER | CARD | {"assets/recipe.yaml"}
    if strategy == "every_save":
        assert states == []
    else:
        assert [push["path_in_repo"] for push in states] == ["last-checkpoint"] * 2
        # All that resuming needs
        needed = {"mentor_state_0.pt", "optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"}
        assert all(needed <= push["files"].keys() for push in states)
        assert not any("training_args.bin" in push["files"] for push in states)


def test_weights_on_their_way_to_a_server_stay_behind(tmp_path):
    trainer = make_trainer(tmp_path, num_mixed_generations=0, vllm_weight_sync_dir=str(tmp_path / "sync" / "here"))
    patterns = ["rollouts/*", "completions/*", "log.jsonl", "recipe.yaml", "sync/here/*"]
    assert withheld(trainer.args, tmp_path) == patterns
    assert withheld(trainer.args, tmp_path / "checkpoint-1") == []
    trainer.args.hub_token, trainer.args.vllm_weight_sync_dir = TOKEN, "/dev/shm/elsewhere"
    assert withheld(trainer.args, tmp_path) == ["training_args.bin", *patterns[:4]]
    assert withheld(trainer.args, tmp_path / "checkpoint-1") == ["training_args.bin"]
    assert withheld(trainer.args, tmp_path.parent) == []
    trainer.args.vllm_weight_sync_dir = None
    # The Trainer leaves out what begins so
    assert weights_root(trainer.args).relative_to(tmp_path).name.startswith("_")


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline\nmode"), httpx.ConnectError("no route")])
def test_a_hub_that_cannot_be_reached_ends_the_run_before_models_are_loaded(
    stand_in, capsys, monkeypatch, tmp_path, tiny_model_dir, tiny_expert_dir, error
):
    monkeypatch.setattr(train, "_make_trainer", lambda *args: pytest.fail("the trainer was built"))
    stand_in.error = error
    with pytest.raises(SystemExit) as stop:
        train.run(train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, push_to_hub=True))
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "the repository 'out' cannot be made on the Hub: " + " ".join(str(error).split()) in message
    assert "hf auth login" in message


def test_the_real_api_offline(tmp_path):
    args = make_trainer(tmp_path, num_mixed_generations=0).args
    with pytest.raises(SetupError, match="cannot be made on the Hub: .*offline mode"):
        make_repository(args)
    args.hub_model_id = "not/a/name"
    with pytest.raises(SetupError, match="'not/a/name' cannot be made"):
        make_repository(args)


def test_a_push_that_fails_says_where_the_model_is(stand_in, tmp_path):
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, hub_strategy="end", max_steps=1)
    trainer.train()
    stand_in.error = httpx.ConnectError("gone")
    with pytest.raises(train.UsageError) as error:
        train._publish(trainer, None)
    message = str(error.value)
    assert f"saved in {tmp_path / 'out'}, but could not be pushed to me/out: gone" in message
    assert f"hf upload me/out {tmp_path / 'out'} . --exclude 'checkpoint-*' --exclude 'rollouts/*'" in message
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "README.md").exists()


def test_uploads_of_others_are_left_alone(stand_in, tmp_path):
    args = make_trainer(tmp_path / "out", num_mixed_generations=0, hub_token=TOKEN).args
    shared = transformers.trainer.hf_api
    for name in ("out/rollouts/a", "other/rollouts/a"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with hub.model_files_only(args):
        for name in ("out", "other"):
            transformers.trainer.hf_api().upload_folder(repo_id="me/x", folder_path=tmp_path / name)
        HfApi().upload_folder(repo_id="me/x", folder_path=tmp_path / "out")  # as trackers do
    assert [push["files"].keys() for push in stand_in.pushes] == [set(), {"rollouts/a"}, {"rollouts/a"}]
    assert transformers.trainer.hf_api is shared


def test_without_a_push_the_folder_has_its_card(stand_in, tmp_path, tiny_model_dir, tiny_expert_dir):
    argv = train_argv(tmp_path, tiny_model_dir, tiny_expert_dir, save_strategy="no")
    assert train.run(argv) == 0
    assert stand_in.created == stand_in.pushes == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Model Card for out" in card and "`rows.jsonl, local`" in card and str(tmp_path) not in card
