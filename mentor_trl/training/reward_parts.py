"""Rewards of a rollout batch, some of whose rows may be rewarded before the others are sampled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational


# Numbers of completions; other metrics of a reward function are taken as means over the rows of its call
COUNTS = ("mentor/verifier_failures", "mentor/unparseable_solutions")


class RewardParts:
    """
    Calls the reward functions once for all rows of a batch, or once for some and once for the others.

    What they log is put together: columns of `log_extra` in the order of the rows, with `None` where a call did not
    log them; counts of `log_metric` as sums, and other metrics as means weighted by the rows of each call.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer with its `processes`. It decodes, weighs and logs.
        calculate (`Callable`):
            Its own `_calculate_rewards`.
        inputs (`list[dict[str, Any]]`):
            Rows of the dataset, of this process.
    """

    def __init__(self, trainer, calculate: Callable, inputs: list[dict[str, Any]]):
        self.processing_class, self.tokenizer = trainer.processing_class, trainer._tokenizer
        self.weights, self.processes = trainer.reward_weights, trainer.processes
        self.extra, self.metrics = trainer._pending_extra_logs, trainer._pending_metrics
        self.calculate, self.inputs = calculate, inputs
        self.rows: list[int] = []
        self.rewards_N_F: torch.Tensor | None = None
        self.logged: tuple[dict[str, list], dict[str, list[float]]] = ({}, {})

    def first(self, rows: list[int], prompt_ids: Sequence[list[int]], completion_ids: list[list[int]]) -> torch.Tensor:
        """
        Weighted rewards of the same rows of each process, `(processes * rows,)`, NaN where undefined. Collective.
        """
        inputs = [self.inputs[row] for row in rows]
        prompts = [row["prompt"] for row in inputs]
        completions = self._decoded(prompts, prompt_ids, completion_ids)
        self.rows, self.rewards_N_F = rows, self.calculate(inputs, prompts, completions, completion_ids)
        self.logged = self._taken()
        return self.weighted(self.rewards_N_F)

    def all(self, inputs, prompts, completions, completion_ids) -> torch.Tensor:
        """Rewards of all rows of all processes by each function, `(N, F)`, NaN where undefined. Collective."""
        if not self.rows:
            return self.calculate(inputs, prompts, completions, completion_ids)
        known = set(self.rows)
        rest = [row for row in range(len(prompts)) if row not in known]
        given = inputs, prompts, completions, completion_ids
        rewards_N_F = self.calculate(*([values[row] for row in rest] for values in given))
        self._log_together(rest)
        whole = rewards_N_F.new_empty((self.processes.count, len(prompts), rewards_N_F.size(1)))
        for part, values in ((self.rows, self.rewards_N_F), (rest, rewards_N_F)):
            whole[:, part] = values.view(self.processes.count, len(part), -1)
        return whole.flatten(0, 1)

    def weighted(self, rewards_N_F: torch.Tensor) -> torch.Tensor:
        """Rewards of rows, NaN where every function is undefined."""
        rewards_N = (rewards_N_F * self.weights.to(rewards_N_F.device)).nansum(dim=1)
        return rewards_N.masked_fill(rewards_N_F.isnan().all(dim=1), torch.nan)

    def _decoded(self, prompts: list, prompt_ids: Sequence[list[int]], completion_ids: list[list[int]]) -> list:
        """Completions as [`~trl.GRPOTrainer`] gives them to reward functions."""
        if not is_conversational({"prompt": prompts[0]}):
            return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        templates = (getattr(self.tokenizer, name, None) for name in ("response_template", "response_schema"))
        if any(template is not None for template in templates):
            pairs = zip(prompt_ids, completion_ids, strict=True)
            return [[parse_response(self.tokenizer, ids, prefix=prompt, tools=None)] for prompt, ids in pairs]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _taken(self) -> tuple[dict[str, list], dict[str, list[float]]]:
        logged = dict(self.extra), dict(self.metrics)
        self.extra.clear()
        self.metrics.clear()
        return logged

    def _log_together(self, rest: list[int]) -> None:
        (first_extra, first_metrics), (extra, metrics) = self.logged, self._taken()
        order = sorted(range(len(self.rows) + len(rest)), key=[*self.rows, *rest].__getitem__)
        for column in {**first_extra, **extra}:
            blank = [None] * len(self.rows), [None] * len(rest)
            values = [*first_extra.get(column, blank[0]), *extra.get(column, blank[1])]
            self.extra[column].extend(values[index] for index in order)
        for name in {**first_metrics, **metrics}:
            parts = (first_metrics.get(name), len(self.rows)), (metrics.get(name), len(rest))
            means = [(sum(values) / len(values), rows) for values, rows in parts if values]
            total = 1 if name in COUNTS else sum(rows for _, rows in means)
            self.metrics[name].append(sum(v * (1 if name in COUNTS else rows) for v, rows in means) / total)
