"""The expert scores what the policy wrote: on-policy distillation, GATS and Distilled RL."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.iw_opd import IWOPDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from helpers import make_tiny_model
from mentor_trl.training.loss_pass import averaged
from trainer_helpers import RecordingTrainer, advantages_by_hand, make_trainer


PLAIN = {"num_mixed_generations": 0, "temperature": 0.8}
MIXED = {"num_mixed_generations": 4, "temperature": 0.8, "branch_rule": "random", "branch_share": 0.4}
GATS = {"distillation": "gats", "gats_reference": 0.9, "distillation_coef": 0.3}


class GradientTrainer(RecordingTrainer):
    """At every step, the gradient of the loss beside that of a computation row by row and token by token."""

    def __init__(self, *args, **kwargs):
        self.gradients, self.expert = [], make_tiny_model(seed=1)
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self.start = make_tiny_model(seed=0)
        self.start.load_state_dict(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        batch = self.batches[-1]
        args, rewards = self.args, batch["rewards"].tolist()
        rows = advantages_by_hand(rewards, args.num_generations, args.num_mixed_generations, batch["alpha"])
        self.rows, mixed = {}, 0
        for i, advantage in enumerate(rows):
            branch = None
            if batch["guided"][i]:
                branch, mixed = batch["rollout"].branch[mixed], mixed + 1
            self.rows[self.key(batch, i)] = (advantage, branch)
        return output

    @staticmethod
    def key(batch, i):
        return (
            tuple(batch["completion_ids"][i].tolist()),
            tuple(batch["prompt_ids"][i].tolist()),
            batch["mentor_source"][i].item(),
        )

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        parameters = list(model.parameters())
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected = torch.autograd.grad(self.by_hand(model, inputs), parameters)
        self.gradients.append([torch.cat([g.flatten() for g in grads]) for grads in (gradient, expected)])
        return loss

    def distributions(self, model, prompt, reply):
        logits = model(input_ids=torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
        return (logits / self.temperature).log_softmax(-1)

    def logps(self, model, prompt, reply):
        return self.distributions(model, prompt, reply)[range(len(reply)), reply]

    def by_hand(self, model, inputs):
        total, tokens, steps = 0.0, int(inputs["num_items_in_batch"]), self.args.steps_per_generation
        for i in range(len(inputs["completion_ids"])):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
            reply = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
            logps = self.logps(model, prompt, reply)
            with torch.no_grad():
                old, logs = (self.logps(other, prompt, reply) for other in (self.start, self.expert))
            row, branch = self.rows[self.key(inputs, i)]
            branch = torch.zeros(len(reply), dtype=torch.bool) if branch is None else branch[: len(reply)]
            advantages = self.advantages(row, branch, inputs["mentor_source"][i] == 1, old.tolist(), logs.tolist())
            for t, advantage in enumerate(advantages):
                ratio = (logps[t] - old[t]).exp()
                clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
                total = total + torch.min(ratio * advantage, clipped * advantage)
            if self.args.distillation_loss != "sampled":
                total = total - self.weight * self.divergence(model, prompt, reply)
        return -total / (tokens / steps * self.current_gradient_accumulation_steps)

    def advantages(self, row, branch, mixed, old, logs):
        """Of each token of a row whose reward is worth `row`."""
        args = self.args
        rho = [min(1.0, math.exp(p - s)) ** 0.25 if b else 1.0 for p, s, b in zip(old, logs, branch)]
        if args.distillation == "distilled_rl":
            if row <= 0.0 or mixed:
                return [row * r for r in rho]
            bound = args.distillation_clip
            ratios = [min(max(math.exp(s - p), 1 / bound), bound) for p, s in zip(old, logs)]
            mean = math.prod(ratios) ** (1 / len(ratios))
            return [row * ratio / mean for ratio in ratios]
        if args.distillation == "opd" and not args.distillation_reward:
            row = 0.0
        if args.distillation_loss != "sampled":
            return [row * r for r in rho]
        return [row * r + self.weight * (0.0 if b else s - p) for p, s, r, b in zip(old, logs, rho, branch)]

    @property
    def weight(self):
        gats = self.args.distillation == "gats"
        gap = max(0.0, 1.0 - self.algorithm.student / self.algorithm.teacher) if gats else 1.0
        return self.args.distillation_coef * gap

    def divergence(self, model, prompt, reply):
        """KL(p || s) at every token, with the gradient that autograd finds; the tokens beyond the k are one."""
        p = self.distributions(model, prompt, reply).exp()
        s = self.distributions(self.expert, prompt, reply).exp().detach()
        if self.args.distillation_loss == "top_k":
            first = p.sort(descending=True).indices[:, : self.args.distillation_top_k]
            p, s = (torch.cat([q.gather(1, first), 1 - q.gather(1, first).sum(1, keepdim=True)], 1) for q in (p, s))
        return (p * (p / s).log()).sum()


METHODS = {
    "opd": {"distillation": "opd", "distillation_coef": 0.7},
    "opd_with_reward": {"distillation": "opd", "distillation_reward": True},
    "gats": GATS,
    "distilled_rl": {"distillation": "distilled_rl"},
    "full": {"distillation": "opd", "distillation_loss": "full"},
    "full_with_reward": {"distillation": "opd", "distillation_loss": "full", "distillation_reward": True},
    "top_k": {"distillation": "opd", "distillation_loss": "top_k", "distillation_top_k": 5},
    "gats_full": {**GATS, "distillation_loss": "full"},
}
STEPS = {
    "at_ratio_1": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "several_iterations": {"num_iterations": 3, "max_steps": 3, "learning_rate": 0.03},
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rows", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_a_hand_computation(method, rows, steps, tmp_path):
    trainer = make_trainer(tmp_path, cls=GradientTrainer, **rows, **METHODS[method], **STEPS[steps])
    trainer.train()
    assert len(trainer.gradients) >= 2
    for gradient, expected in trainer.gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=5e-6)
        assert expected.norm() > 1e-3


class TermTrainer(RecordingTrainer):
    """Beside the gradient of TRL's loss, that of -A log p, averaged as a term of the loss is."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        pairs = ([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]] for what in ("ids", "mask"))
        ids, mask = (torch.cat(pair, 1) for pair in pairs)
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))[0]
        ours = averaged(-inputs["advantages"] * logps, inputs, self.args, self.current_gradient_accumulation_steps, 1)
        found = (torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (loss, ours))
        self.gradients = [torch.cat([g.flatten() for g in grads]) for grads in found]
        return loss


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_a_term_of_the_loss_is_averaged_as_trl_averages(loss_type, tmp_path):
    """At ratio 1 the gradient of TRL's loss is that of -A log p, whatever it does to ratios."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, "loss_type": loss_type, "epsilon_high": 5.0}
    trainer = make_trainer(tmp_path, cls=TermTrainer, **PLAIN, **METHODS["opd"], **settings)
    trainer.train()
    theirs, ours = trainer.gradients
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-6)
    assert theirs.norm() > 1e-3


# The same in TRL


class TRLTrainer(GradientTrainer):
    """The hand computation is TRL's."""

    def by_hand(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width, reply = inputs["prompt_ids"].size(1), inputs["completion_mask"]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        policy, expert = (m(**given, output_hidden_states=True) for m in (model, self.expert))
        if self.args.distillation_loss == "full":
            states = (outputs.hidden_states[-1][:, width - 1 : -1] for outputs in (policy, expert))
            heads = (m.get_output_embeddings().weight for m in (model, self.expert))
            options = {"num_items_in_batch": inputs["num_items_in_batch"], "temperature": self.temperature}
            return _chunked_divergence_loss(*states, *heads, reply, 1.0, **options)[0]
        tokens = inputs["completion_ids"]
        scores = (expert.logits[:, width - 1 : -1] / self.temperature).log_softmax(-1)
        trainer = SimpleNamespace(temperature=self.temperature, iw_opd_gamma=0.0, iw_opd_epsilon=1e-8, model=model)
        trainer._metrics = {"train": defaultdict(list)}
        return IWOPDTrainer._compute_iw_opd_loss(
            trainer,
            student_logits=policy.logits[:, width - 1 : -1],
            completion_tokens=tokens,
            labels=tokens.masked_fill(reply == 0, -100),
            teacher_actual_logprobs=scores.gather(2, tokens.unsqueeze(2)).squeeze(2),
            num_items_in_batch=inputs["num_items_in_batch"],
        )


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_gradients_are_those_of_trl(loss, tmp_path):
    """Of IW-OPD with gamma 0, and of the DistillationTrainer."""
    trainer = make_trainer(tmp_path, cls=TRLTrainer, distillation="opd", distillation_loss=loss, **PLAIN)
    trainer.train()
    assert len(trainer.gradients) >= 2
    for gradient, expected in trainer.gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=5e-6)
        assert expected.norm() > 1e-3
