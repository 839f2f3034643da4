"""The expert scores what the policy wrote: on-policy distillation, GATS and Distilled RL."""

import math

import pytest
import torch

from helpers import make_tiny_model
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

    def logps(self, model, prompt, reply):
        logits = model(input_ids=torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
        return (logits / self.temperature).log_softmax(-1)[range(len(reply)), reply]

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
        weight = args.distillation_coef
        if args.distillation == "gats":
            weight *= max(0.0, 1.0 - self.algorithm.student / self.algorithm.teacher)
        elif not args.distillation_reward:
            row = 0.0
        return [row * r + weight * (0.0 if b else s - p) for p, s, r, b in zip(old, logs, rho, branch)]


METHODS = {
    "opd": {"distillation": "opd", "distillation_coef": 0.7},
    "opd_with_reward": {"distillation": "opd", "distillation_reward": True},
    "gats": GATS,
    "distilled_rl": {"distillation": "distilled_rl"},
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
    for gradient, expected in trainer.gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=5e-6)
        assert expected.norm() > 1e-3
