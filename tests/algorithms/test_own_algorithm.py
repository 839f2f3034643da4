"""An algorithm in a file of its own: all that a method needs, and what the trainer makes of it."""

import pandas as pd
import pytest
import torch

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.algorithms import Algorithm
from mentor_trl.errors import SetupError
from mentor_trl.training.batch import RolloutBatch
from trainer_helpers import RecordingTrainer, advantages_by_hand, history, make_trainer, same_weights, weights


# The algorithm: GRPO, and per token how much likelier the expert finds it. Sums, not products.


class Distillation(Algorithm):
    """A_it = A_i + c (log s - log p)."""

    name = "Distillation"
    tags = ["trl", "distillation"]
    needs_expert = True
    needs_scores = True
    needs_policy_logps = True
    constant = 0.5

    def credit(self, batch, scored):
        credit = super().credit(batch, scored)
        scores = self.context.expert.score(batch.prompt_ids, batch.completion_ids, self.args.temperature)
        gap_B_T = torch.zeros_like(scored.policy_logps_B_T)
        gap_B_T[:, : scores.size(1)] = scores - scored.policy_logps_B_T[:, : scores.size(1)]
        gap_B_T = gap_B_T.masked_fill(~scored.mask_B_T, 0.0)
        advantages = credit.advantages.unsqueeze(1) + self.constant * gap_B_T
        gap = self.context.processes.gather_tokens(gap_B_T[scored.mask_B_T]).mean().item()
        return credit._replace(advantages=advantages, metrics={"mentor/gap": gap})


def make_distilled(folder, cls=RecordingTrainer, **settings):
    kwargs = {"expert": make_tiny_model(seed=1), "expert_processing_class": make_tiny_tokenizer()}
    kwargs |= {"algorithm": Distillation, **settings.pop("trainer_kwargs", {})}
    settings = {"num_mixed_generations": 0, "temperature": 0.8, "gradient_accumulation_steps": 2, **settings}
    return make_trainer(folder, cls=cls, trainer_kwargs=kwargs, **settings)


def token_logps(model, batch, temperature: float) -> torch.Tensor:
    """Log-probabilities of the completions, by a plain forward pass over the whole batch."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    length = batch["completion_ids"].size(1)
    logps = (logits[:, -length - 1 : -1] / temperature).log_softmax(-1)
    return logps.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)


def test_sums_reach_the_loss(tmp_path):
    trainer = make_distilled(tmp_path, max_steps=1)
    start = weights(trainer)
    trainer.train()
    (batch,) = trainer.batches
    policy = make_tiny_model(seed=0)
    policy.load_state_dict(start)
    gap = token_logps(make_tiny_model(seed=1), batch, 0.8) - token_logps(policy, batch, 0.8)
    rows = torch.tensor(advantages_by_hand(batch["rewards"].tolist(), 8, 0, 0.0))
    mask = batch["completion_mask"].bool()
    expected = rows.unsqueeze(1) + 0.5 * gap
    torch.testing.assert_close(batch["advantages"][mask], expected[mask], atol=1e-4, rtol=1e-4)
    assert gap[mask].abs().max() > 0.5
    assert batch["row_advantages"] == pytest.approx(rows.tolist(), abs=1e-5)
    assert history(trainer)[0]["mentor/gap"] == pytest.approx(gap[mask].mean().item(), rel=1e-3)
    assert not same_weights(start, weights(trainer))


def test_the_model_card_and_the_tags_are_its_own(tmp_path):
    trainer = make_distilled(tmp_path, max_steps=1)
    assert "distillation" in trainer.model.model_tags and trainer._name == "Distillation"


def test_scores_need_an_expert_at_hand(tmp_path):
    class Blind(Distillation):
        needs_expert = False

    with pytest.raises(SetupError, match="Blind.*log-probabilities of the expert.*`use_vllm=False`"):
        make_distilled(tmp_path, trainer_kwargs={"algorithm": Blind})


class Thirds(Algorithm):
    """Rows of three sources, which are worth 1, 2 and 3."""

    sources = ("on_policy", "second", "third")

    def __init__(self, args):
        super().__init__(args)
        self.heard = []

    def plan(self, inputs, first):
        rows = torch.arange(first, first + len(inputs))
        return RolloutBatch(self.sources, rows % 3)

    def credit(self, batch, scored):
        advantages_N = scored.source_N + 1.0
        return super().credit(batch, scored)._replace(advantages=advantages_N[scored.local], advantages_N=advantages_N)

    def observe(self, batch, scored):
        self.heard.append(scored.rewards_N.tolist())

    def state_dict(self):
        return {"heard": self.heard}

    def load_state_dict(self, state):
        self.heard = state["heard"]


def make_thirds(folder, **settings):
    settings = {"num_mixed_generations": 0, "max_steps": 4, "steps_per_generation": 2, **settings}
    return make_trainer(folder, cls=RecordingTrainer, trainer_kwargs={"algorithm": Thirds}, **settings)


def test_any_number_of_sources(tmp_path):
    trainer = make_thirds(tmp_path / "whole", log_completions=True, save_strategy="steps", save_steps=3)
    trainer.train()
    (entry,) = [entry for entry in history(trainer) if entry.get("step") == 1 and "loss" in entry]
    for index, source in enumerate(Thirds.sources):
        assert entry[f"mentor/{source}/advantage"] == index + 1.0
        assert entry[f"mentor/{source}/entropy"] > 0.0
    table = pd.read_parquet(tmp_path / "whole" / "completions" / "completions_00001.parquet")
    assert table["source"].tolist() == [Thirds.sources[i % 3] for i in range(16)]
    assert table["advantage"].tolist() == [i % 3 + 1.0 for i in range(16)]
    assert trainer.algorithm.heard == [batch["rewards"].tolist() for batch in trainer.batches]

    resumed = make_thirds(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same_weights(weights(resumed), weights(trainer))
    assert resumed.algorithm.heard == trainer.algorithm.heard
