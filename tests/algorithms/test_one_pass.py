"""All rows at once, under the gamma of the batch before."""

from contextlib import contextmanager

import pytest
import torch

from mentor_trl.objective import branch_weight, entropy_threshold
from trainer_helpers import RecordingTrainer, history, make_trainer, weights


SETTINGS = {"max_steps": 4, "entropy_threshold_from": "previous"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("one_pass"), cls=Requests, **SETTINGS)
    trainer.train()
    return trainer


class Requests(RecordingTrainer):
    """Keeps the requests to the engine, and what came back."""

    def __init__(self, *args, **kwargs):
        self.asked = []
        super().__init__(*args, **kwargs)
        session = self.engine.session

        @contextmanager
        def watched():
            with session() as found:
                yield Watched(found, self.asked)

        self.engine.session = watched


class Watched:
    def __init__(self, session, asked):
        self.session, self.asked = session, asked

    def sample(self, request, progress=None):
        rollout = self.session.sample(request, progress)
        self.asked.append((request, rollout))
        return rollout


def test_gamma_is_that_of_the_batch_before(trained):
    first, second, *later = trained.asked
    assert first[0].plain and not second[0].plain  # the first batch takes its own
    assert [len(request.prompt_ids) for request, _ in later] == [8] * 3
    entropies = first[1].entropies[first[1].mask]
    for request, rollout in [second, *later]:
        due = entropy_threshold(entropies, 0.95, 0.1)
        assert set(request.gamma) - {float("inf")} == {due}
        plain = torch.tensor(request.gamma) == float("inf")
        if plain.any():
            entropies = rollout.entropies[plain][rollout.mask[plain]]
            assert not rollout.branch[plain].any() and rollout.branch[~plain].any()
    logged = [logs["mentor/gamma"] for logs in trained.state.log_history if "mentor/gamma" in logs]
    assert logged == pytest.approx([max(set(request.gamma) - {float("inf")}) for request, _ in [second, *later]])


def test_a_resumed_run_goes_on_with_the_gamma_that_it_had(trained, tmp_path):
    cut = make_trainer(tmp_path, **SETTINGS, save_strategy="steps", save_steps=2)
    cut.train()
    resumed = make_trainer(tmp_path, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, ("train_loss",))[-3:] == history(trained, ("train_loss",))[-3:]
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(trained).items())


@pytest.mark.parametrize("rule", ["random", "sentence"])
def test_shares(rule, tmp_path):
    trainer = make_trainer(tmp_path, cls=Requests, max_steps=2, branch_rule=rule, branch_share=0.5, branch_span=3)
    trainer.train()
    mixed = [request for request, _ in trainer.asked if not request.plain]
    assert {request.share for request in mixed} == {0.5} and {request.span for request in mixed} == {3}
    assert all(bool(request.sentence_ids) == (rule == "sentence") for request in mixed)


def test_the_share_of_random_positions_is_that_of_the_entropy_rule_unless_it_is_set(tmp_path):
    trainer = make_trainer(tmp_path, cls=Requests, max_steps=1, branch_rule="random")
    trainer.train()
    (_, on_policy), (request, _) = trainer.asked
    entropies = on_policy.entropies[on_policy.mask].double()
    assert request.share == pytest.approx(branch_weight(entropies, entropy_threshold(entropies)).mean().item())


@pytest.fixture(scope="module")
def all_mixed(tmp_path_factory):
    settings = {**SETTINGS, "num_mixed_generations": 8, "reward_range": 2.0}
    trainer = make_trainer(tmp_path_factory.mktemp("all_mixed"), cls=Requests, **settings)
    trainer.train()
    return trainer


def test_gamma_of_mixed_rows_alone(all_mixed):
    """The first batch samples on-policy rows for gamma, and every later one has that of the mixed rows before."""
    first, *later = all_mixed.asked
    assert first[0].plain and [len(request.prompt_ids) for request, _ in [first, *later]] == [8] * 5
    before = [first, *later]
    for (_, heard), (request, rollout) in zip(before, later):
        assert set(request.gamma) == {entropy_threshold(heard.entropies[heard.mask], 0.95, 0.1)}
        assert rollout.branch.any() and not rollout.branch.all()


def test_the_mean_of_mixed_rows_is_their_baseline(all_mixed):
    logs = [entry for entry in all_mixed.state.log_history if "mentor/mixed/reward" in entry]
    assert len(logs) == 4 and not any("mentor/on_policy/reward" in entry for entry in logs)
    for batch, entry in zip(all_mixed.batches, logs):
        gains = (batch["rewards"] - batch["rewards"].mean()).clamp(min=0.0)
        assert batch["guided"].all() and gains.any()
        assert batch["row_advantages"] == pytest.approx((batch["alpha"] * gains / 2.0).tolist())
        assert entry["frac_reward_zero_std"] == 0.0


def test_mixed_advantages_by_the_spread_of_on_policy_rewards(tmp_path):
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, mixed_advantage_scale="std", max_steps=1, reward_range=0.1)
    trainer.train()
    (batch,) = trainer.batches
    on_policy, mixed = batch["rewards"].split(4)
    gains = (mixed - on_policy.mean()).clamp(min=0.0) / (on_policy.std() + 1e-4)
    assert on_policy.std() > 0.0 and gains.any()
    assert batch["row_advantages"][4:] == pytest.approx(gains.tolist())
