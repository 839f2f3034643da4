"""
What a run costs, as one number: tokens that a model reads forward, times its parameters.

A token that the policy samples counts 1, one that it is trained on 3 (a pass back is two forward), each times the
policy's parameters; a token that the expert reads or writes counts 1, times the expert's. Prompts count, too. The
expert reads every mixed row and every row that it scores as a whole once, and writes each trajectory that is used.
What is not counted: drafts that were thrown away, rewards, evaluation, and passes that all arms make alike.
"""

from typing import Any, NamedTuple


SAMPLED, TRAINED = 1, 3


class Spent(NamedTuple):
    """What was spent up to a step."""

    step: int
    cost: float  # forward-token equivalents x parameters
    expert_tokens: float
    seconds: float  # of training, without starting up and saving


def of_rollouts(
    history: list[dict[str, Any]], options: dict[str, Any], policy: int, expert: int, hint_tokens: float = 0.0
) -> list[Spent]:
    """
    Costs of a training by `mentor-trl train`, a step an entry.

    Args:
        history (`list[dict[str, Any]]`):
            What the trainer logged, a step an entry.
        options (`dict[str, Any]`):
            Fields of the run.
        policy, expert (`int`):
            Parameters of the models.
        hint_tokens (`float`, *optional*, defaults to `0.0`):
            Tokens of the trajectory behind the hint of a prompt, where prompts have hints.
    """
    spent, cost, expert_tokens, seconds, before = [], 0.0, 0.0, 0.0, 0.0
    for entry in history:
        if "step_time" not in entry:
            continue
        seconds += entry["step_time"]
        rows = {name: entry.get(f"mentor/{name}/rows", 0.0) for name in ("on_policy", "mixed", "trajectory")}
        if any(rows.values()):
            written = {name: rows[name] * entry.get(f"mentor/{name}/length", 0.0) for name in rows}
            sampled, before = entry["num_tokens"] - before, entry["num_tokens"]
            # With dynamic sampling some of the rows are thrown away
            trained = sampled * sum(rows.values()) / entry.get("mentor/resampling/rows", sum(rows.values()))
            prompt = (trained - sum(written.values())) / sum(rows.values())
            tokens = {name: written[name] + rows[name] * prompt for name in rows}
            heard = tokens["mixed"] + tokens["trajectory"]
            if written["on_policy"]:  # scores count by the tokens written; a prompt is read with every row
                scored = entry.get("mentor/distillation/expert_tokens", 0.0)
                heard += scored * tokens["on_policy"] / written["on_policy"]
            heard += hint_tokens * sum(rows.values()) / options.get("num_generations", 8)
            cost += policy * (SAMPLED * sampled + TRAINED * trained) + expert * heard
            expert_tokens += heard
        spent.append(Spent(entry["step"], cost, expert_tokens, seconds))
    return spent


def of_supervised(
    history: list[dict[str, Any]], unique_tokens: float, policy: int, expert: int, step_seconds: float = 0.0
) -> list[Spent]:
    """
    Costs of a training by `trl sft` on the expert's trajectories.

    Args:
        history (`list[dict[str, Any]]`):
            What the trainer logged, a step an entry.
        unique_tokens (`float`):
            Tokens of all trajectories: however often they are learned, the expert writes them once.
        policy, expert (`int`):
            Parameters of the models.
        step_seconds (`float`, *optional*, defaults to `0.0`):
            Time of a step.
    """
    spent = []
    for entry in history:
        if "num_tokens" in entry and "loss" in entry:
            written = min(entry["num_tokens"], unique_tokens)
            cost = policy * TRAINED * entry["num_tokens"] + expert * written
            spent.append(Spent(entry["step"], cost, written, entry["step"] * step_seconds))
    return spent
