"""What reward functions may answer."""

import functools
import math

import numpy as np
import pytest
import torch

from mentor_trl.errors import SetupError
from mentor_trl.training.reward_functions import CheckedReward, checked_rewards
from trainer_helpers import history, letters_reward, make_trainer, same_weights, weights


def answering(value):
    def answer(completions, **kwargs):
        return value

    return answer


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"`answer` returned 1.0, a float. It must return one number, or None, per completion, as a list"),
        ("0101", r"returned '0101', a str"),
        ({"a": 1}, r"returned \{'a': 1\}, a dict"),
        (None, r"returned None, a NoneType"),
        ([1.0], r"returned 1 rewards for 2 completions"),
        ([1.0, 0.0, 1.0], r"returned 3 rewards for 2 completions"),
        ([0.0, "1"], r"returned '1', a str, for row 1"),
        ([[1.0], 0.0], r"returned \[1.0\], a list, for row 0"),
        ([0.0, 1j], r"returned 1j, a complex, for row 1"),
        ([math.inf, 0.0], r"returned inf for row 0, whose completion begins with 'ab'.*Bound it"),
        ([0.0, -math.inf], r"returned -inf for row 1, whose completion begins with 'cd'"),
        (torch.tensor([0.0, math.inf]), r"returned inf for row 1"),
    ],
)
def test_answers_that_are_refused(value, message):
    with pytest.raises(SetupError, match=message):
        CheckedReward(answering(value))(completions=["ab", "cd"], prompts=["", ""])


@pytest.mark.parametrize(
    "value",
    [
        [1, None],
        (True, None),
        np.array([1.0, math.nan]),
        torch.tensor([1.0, math.nan]),
        [torch.tensor(1.0), None],
        [np.float32(1.0), np.float64(math.nan)],
        (reward for reward in (1, None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_answers_of_every_kind(value):
    first, second = CheckedReward(answering(value))(completions=["ab", "cd"])
    assert first == 1.0 and type(first) is float
    assert second is None or math.isnan(second)


def test_names_stay():
    class Length:
        def __call__(self, completions, **kwargs):
            return [float(len(text)) for text in completions]

    async def later(completions, **kwargs):
        return [0.0] * len(completions)

    model = torch.nn.Linear(1, 1)
    given = [letters_reward, functools.partial(letters_reward), Length(), later, "org/reward-model", model]
    checked = checked_rewards(given)
    assert [function.__name__ for function in checked[:4]] == ["letters_reward", "letters_reward", "Length", "later"]
    assert checked[4:] == ["org/reward-model", model] and given[0] is letters_reward
    assert checked_rewards(None) is None


@pytest.mark.parametrize("mixed", [0, 4])
def test_an_infinite_reward_ends_the_run_before_it_is_learned_from(mixed, tmp_path):
    def unbounded(completions, **kwargs):
        return [math.inf if i == len(completions) - 1 else 0.0 for i in range(len(completions))]

    trainer = make_trainer(tmp_path, reward_funcs=unbounded, num_mixed_generations=mixed)
    start = weights(trainer)
    with pytest.raises(SetupError, match="`unbounded` returned inf for row 7"):
        trainer.train()
    assert same_weights(weights(trainer), start)


def test_an_awaited_function_is_checked(tmp_path):
    async def later(completions, **kwargs):
        return ["good"] * len(completions)

    with pytest.raises(SetupError, match="`later` returned 'good', a str, for row 0"):
        make_trainer(tmp_path, reward_funcs=later).train()


@pytest.mark.parametrize("undefined", [None, math.nan])
def test_a_batch_without_a_reward_is_warned_of(undefined, tmp_path):
    def nothing(completions, **kwargs):
        return [undefined] * len(completions)

    trainer = make_trainer(tmp_path / "a", reward_funcs=[nothing, letters_reward], max_steps=1)
    with pytest.warns(UserWarning, match=r"reward by nothing: every one is None or NaN\. Look"):
        trainer.train()
    assert history(trainer)[0]["mentor/on_policy/reward"] >= 0.0
    with pytest.warns(UserWarning, match=r"reward by nothing.*Nothing is learned from it\."):
        make_trainer(tmp_path / "b", reward_funcs=nothing, max_steps=1).train()
