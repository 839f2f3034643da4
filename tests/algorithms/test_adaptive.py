"""Guidance by measurement in the trainer."""

import pytest
import torch

from mentor_trl.rollout.local.local_engine import LocalEngine
from mentor_trl.training.batch import RolloutBatch, leave_out
from trainer_helpers import RecordingTrainer, history, make_trainer


# One group a batch. All rewards are 1, so the second batch, whose bound is below 9, is the first that counts.
SETTINGS = {"alpha_schedule": "adaptive", "guidance_margin": 9.0, "guidance_patience": 2, "guidance_probe_every": 3}
SETTINGS |= {"max_completion_length": 6, "max_steps": 7}


def ones(completions, **kwargs) -> list[float]:
    return [1.0] * len(completions)


def mixed_is_better(completions, trainer_state, **kwargs) -> list[float]:
    """Twice as good from the fourth step on."""
    return [1.0 + (i % 8 >= 4 and trainer_state.global_step >= 3) for i in range(len(completions))]


@pytest.fixture
def sessions(monkeypatch) -> list[LocalEngine]:
    """One entry for every time that the mixed-policy engine is used."""
    used, session = [], LocalEngine.session
    monkeypatch.setattr(LocalEngine, "session", lambda self: (used.append(self), session(self))[1])
    return used


def test_from_guidance_to_probes(tmp_path, sessions):
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, reward_funcs=ones, **SETTINGS)
    trainer.train()
    guided = [batch["guided"].sum().item() for batch in trainer.batches]
    assert guided == [4, 4, 4, 0, 0, 4, 0] and len(sessions) == 4
    log = [entry for entry in history(trainer) if "loss" in entry]
    assert [entry["mentor/guidance/withdrawn"] for entry in log] == [0, 0, 0, 1, 1, 1, 1]
    assert [entry["mentor/alpha"] for entry in log] == [1, 1, 1, 0, 0, 0, 0]
    assert [entry.get("mentor/guidance/difference") for entry in log] == [0, 0, 0, None, None, 0, None]
    for batch in trainer.batches:
        lengths = batch["completion_mask"].sum(1)
        probe = batch is trainer.batches[5]
        assert (lengths[batch["guided"]] == 0).all() if probe else (lengths > 0).all()
        assert batch["num_items_in_batch"] == lengths.sum()


def test_without_probes_the_expert_is_freed(tmp_path):
    settings = {**SETTINGS, "guidance_probe_every": 0, "max_steps": 4}
    trainer = make_trainer(tmp_path, reward_funcs=ones, **settings)
    trainer.train()
    assert trainer.engine.released and trainer.algorithm.over


def test_a_probe_brings_guidance_back(tmp_path):
    settings = {**SETTINGS, "guidance_margin": 0.6, "guidance_probe_every": 2, "guidance_smoothing": 0.5}
    settings["guidance_gap_exponent"] = 1.0
    settings |= {"per_device_train_batch_size": 64, "max_completion_length": 3}
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, reward_funcs=mixed_is_better, **settings)
    trainer.train()
    log = [entry for entry in history(trainer) if "loss" in entry]
    # 8 groups without a difference: .29; the probe of the fourth batch has a difference of 1
    assert [entry["mentor/guidance/withdrawn"] for entry in log] == [0, 0, 1, 1, 0, 0, 0]
    assert [entry["mentor/alpha"] for entry in log] == [1, 0, 0, 0, 0.5, 0.5, 0.5]


def test_a_row_that_is_left_out_changes_nothing(tmp_path):
    """The update of a probe is that of its on-policy rows alone."""
    trainers = [make_trainer(tmp_path, max_steps=1, loss_type="dapo") for _ in range(2)]
    trainers[0].model.train()
    output = trainers[0]._prepare_inputs(next(iter(trainers[0].get_train_dataloader())))
    source_B = output["mentor_source"]
    assert source_B.sum() == 4  # TRL shuffles the rows of a batch
    probe, part = dict(output), {}
    leave_out(probe, RolloutBatch(("on_policy", "mixed"), source_B, probe=True), trainers[0].processes)
    for name, value in output.items():
        part[name] = value[source_B == 0] if isinstance(value, torch.Tensor) and value.ndim else value
    part["num_items_in_batch"] = part["completion_mask"].sum()
    gradients = []
    for trainer, batch in zip(trainers, (probe, part)):
        trainer.model.load_state_dict(trainers[0].model.state_dict())
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch).backward()
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients[0])


def test_the_expert_is_moved_off_its_device_and_back(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SETTINGS)
    moved, model = [], trainer.engine.expert.model
    home, place = torch.device("meta"), [torch.device("meta")]
    monkeypatch.setattr(
        type(model), "device", property(lambda self: place[0] if self is model else torch.device("cpu"))
    )
    monkeypatch.setattr(model, "to", lambda device: (moved.append(device.type), place.__setitem__(0, device)))
    trainer.engine.home = home
    for _ in range(2):
        trainer.engine.park_expert()
    with trainer.engine.session():
        pass
    with trainer.engine.session():
        pass
    assert moved == ["cpu", "meta"]
    monkeypatch.setattr(model, "hf_device_map", {"": 0}, raising=False)
    trainer.engine.park_expert()
    assert moved == ["cpu", "meta"]
