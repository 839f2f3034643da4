"""Which checkpoint a run goes on from, and what is wrong with one that it cannot."""

import json
import shutil
import warnings

import pytest
import torch
from datasets import Dataset

from mentor_trl.errors import SetupError
from mentor_trl.training.resume import check_one_batch, find_problem, usable_checkpoint
from trainer_helpers import history, make_trainer, prompts, same_weights, weights


SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "max_completion_length": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint of each of its three steps."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **SETTINGS)
    trainer.train()
    return trainer


@pytest.fixture
def run(whole, tmp_path):
    """A copy of its folder, as a kill after the third checkpoint leaves it."""
    shutil.copytree(whole.args.output_dir, tmp_path / "run")
    return tmp_path / "run"


def cut(path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


DAMAGE = {
    "nothing but the card": lambda folder: [p.unlink() for p in folder.iterdir() if p.name != "README.md"],
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a state": lambda folder: cut(folder / "trainer_state.json"),
    "empty state": lambda folder: cut(folder / "trainer_state.json", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: cut(folder / "model.safetensors"),
    "half a header": lambda folder: cut(folder / "model.safetensors", 0.01),
    "empty weights": lambda folder: cut(folder / "model.safetensors", 0),
    "half an optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "half random states": lambda folder: cut(folder / "rng_state.pth"),
    "half of ours": lambda folder: cut(folder / "mentor_state_0.pt"),
    "half a configuration": lambda folder: cut(folder / "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, run, whole):
    newest = run / "checkpoint-3"
    assert find_problem(newest) is None
    DAMAGE[damage](newest)
    with pytest.warns(UserWarning, match=r"checkpoint-3 is passed over: \S+ .*"):
        assert usable_checkpoint(True, str(run)) == str(run / "checkpoint-2")
    with pytest.raises(SetupError, match=r"checkpoint-3 cannot be resumed: .*\. Resume from another one"):
        usable_checkpoint(str(newest), str(run))


def test_the_run_goes_on_from_the_one_before(run, whole):
    DAMAGE["half an optimizer"](run / "checkpoint-3")
    trainer = make_trainer(run, **SETTINGS)
    with pytest.warns(UserWarning, match="checkpoint-3 is passed over: optimizer.pt is cut off"):
        trainer.train(resume_from_checkpoint=True)
    assert same_weights(weights(trainer), weights(whole))
    assert find_problem(run / "checkpoint-3") is None


def test_without_a_whole_one_the_run_starts_anew(run, whole):
    for step in (1, 2, 3):
        DAMAGE["half a state"](run / f"checkpoint-{step}")
    trainer = make_trainer(run, **SETTINGS)
    with pytest.warns(UserWarning, match="No checkpoint in .* is whole: the run starts from the beginning"):
        trainer.train(resume_from_checkpoint=True)
    assert same_weights(weights(trainer), weights(whole)) and history(trainer) == history(whole)


def test_what_is_no_checkpoint(tmp_path):
    assert usable_checkpoint(None, str(tmp_path)) is None and usable_checkpoint(False, str(tmp_path)) is False
    assert usable_checkpoint(True, str(tmp_path)) is True  # the Trainer says that there is none
    (tmp_path / "checkpoint-best").mkdir()
    assert usable_checkpoint(True, str(tmp_path)) is True
    with pytest.raises(SetupError, match="nowhere cannot be resumed: there is no such folder"):
        usable_checkpoint(str(tmp_path / "nowhere"), str(tmp_path))


def test_missing_shards(run):
    folder = run / "checkpoint-3"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert find_problem(folder) == (
        "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("optimizer.pt", "the optimizer starts anew"),
        ("scheduler.pt", "the learning rate starts anew"),
        ("rng_state.pth", "random numbers differ"),
    ],
)
def test_a_missing_part_is_warned_of(name, what, run, whole):
    (run / "checkpoint-2" / name).unlink()
    trainer = make_trainer(run, **SETTINGS)
    with pytest.warns(UserWarning, match=rf"checkpoint-2 has no {name}: {what}"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_whole_checkpoint_is_not_warned_of(run):
    trainer = make_trainer(run, **SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert not [str(w.message) for w in caught if "The checkpoint" in str(w.message)]


def test_a_checkpoint_of_version_0_1(whole, run):
    """Its state had other names, and rows a flag in the place of their source."""
    trainer = make_trainer(run, steps_per_generation=2, **{**SETTINGS, "save_steps": 3, "max_steps": 4})
    trainer.train()
    path = run / "checkpoint-3" / "mentor_state_0.pt"
    state = torch.load(path, weights_only=True)
    state["guidance"] = state.pop("algorithm")
    for row in state["buffered_inputs"]:
        row["mentor_mixed"] = row.pop("mentor_source") == 1
    del state["tokens"]
    torch.save(state, path)
    resumed = make_trainer(run, steps_per_generation=2, **{**SETTINGS, "save_strategy": "no", "max_steps": 4})
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert same_weights(weights(resumed), weights(trainer))


def test_a_dataset_smaller_than_a_batch(tmp_path):
    check_one_batch(Dataset.from_dict({"prompt": ["1"] * 2}), 16, 8)
    with pytest.raises(SetupError, match=r"`train_dataset` has 3 prompts and a rollout batch takes 4 .*no step would"):
        make_trainer(tmp_path, train_dataset=prompts(3), gradient_accumulation_steps=4).train()


def test_a_tokenizer_without_an_end(tmp_path, tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(SetupError, match=r"no end-of-sequence token.*Set `eos_token`"):
        make_trainer(tmp_path, processing_class=tiny_tokenizer, num_mixed_generations=0)
