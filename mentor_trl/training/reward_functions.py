"""Reward functions whose answers are looked at before they reach the advantages."""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from ..errors import SetupError


class CheckedReward:
    """
    A reward function that must answer a finite number, NaN or `None` (undefined) for each completion.

    Args:
        function (`Callable`):
            Function as [`~trl.GRPOTrainer`] takes it.

    Raises:
        [`SetupError`]: naming the function, the row and the value.
    """

    def __init__(self, function: Callable):
        self.function, self.__name__ = function, get_callable_name(function)

    def __call__(self, *, completions: list, **kwargs: Any) -> list[float | None]:
        return self.check(self.function(completions=completions, **kwargs), completions)

    def check(self, rewards: Any, completions: list) -> list[float | None]:
        """The rewards as a list of numbers."""
        where, advice = f"The reward function `{self.__name__}`", "It must return one number, or None, per completion"
        if isinstance(rewards, torch.Tensor):
            rewards = rewards.tolist()
        if isinstance(rewards, (str, dict)) or not isinstance(rewards, Iterable):
            raise SetupError(f"{where} returned {rewards!r:.80}, a {type(rewards).__name__}. {advice}, as a list.")
        rewards = list(rewards)
        if len(rewards) != len(completions):
            raise SetupError(f"{where} returned {len(rewards)} rewards for {len(completions)} completions. {advice}.")
        for row, reward in enumerate(rewards):
            if reward is None:
                continue
            number = reward.item() if isinstance(reward, torch.Tensor) and reward.numel() == 1 else reward
            if not isinstance(number, numbers.Real):
                kind = type(reward).__name__
                raise SetupError(f"{where} returned {reward!r:.80}, a {kind}, for row {row}. {advice}.")
            rewards[row] = float(number)
            if math.isinf(rewards[row]):
                raise SetupError(
                    f"{where} returned {rewards[row]} for row {row}, whose completion begins with "
                    f"{completions[row]!r:.80}. {advice}: an infinite one would destroy the weights. Bound it, or "
                    "return None where it is undefined."
                )
        return rewards


class CheckedAsyncReward(CheckedReward):
    """[`CheckedReward`] of a function whose call is awaited."""

    async def __call__(self, *, completions: list, **kwargs: Any) -> list[float | None]:
        return self.check(await self.function(completions=completions, **kwargs), completions)


def checked_rewards(reward_funcs: Any) -> Any:
    """Reward functions of a trainer's argument, checked; models and their names stay as they are."""
    if reward_funcs is None:
        return None
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    return [_checked(function) for function in given]


def _checked(function: Any) -> Any:
    if isinstance(function, (str, torch.nn.Module)):
        return function
    return (CheckedAsyncReward if is_async_callable(function) else CheckedReward)(function)


def warn_of_undefined(rewards_N_F: torch.Tensor, names: list[str]) -> None:
    """Warn where a function has no reward in a whole batch."""
    undefined = [name for name, column in zip(names, rewards_N_F.unbind(1)) if column.isnan().all()]
    if undefined:
        rest = "" if len(undefined) < len(names) else " Nothing is learned from it."
        who = ", ".join(undefined)
        warnings.warn(
            f"No completion of a rollout batch has a reward by {who}: every one is None or NaN.{rest} "
            "Look at what the function is given, such as the column with the solutions.",
            stacklevel=2,
        )
