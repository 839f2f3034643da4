"""
Runs whose numbers are stored, and runs that must have the numbers of others.

The first run of a class owns the class's entry in references.json, which every platform's floating point must meet
within 1e-4. Every other run of the class must meet the first one, here and now. invariant_runs.py says how to record.
"""

import json
import platform
from functools import cache
from typing import NamedTuple

import pytest
import torch

from invariant_runs import REFERENCES, Trajectory, run, run_on_two_processes, stored


class Class(NamedTuple):
    within: float
    first: str
    others: tuple[str, ...]


CLASSES = (
    # within, the run that is stored, and those that must agree with it
    Class(0, "trl", ("no mixed rows", "alpha 0")),
    Class(0, "trl, off-policy", ("no mixed rows, off-policy", "alpha 0, off-policy")),
    Class(0, "trl, evaluated", ("no mixed rows, evaluated", "alpha 0, evaluated")),
    Class(0, "mentor", ("mentor, resumed", "mentor, served")),
    Class(0, "mixture", ("mixture, resumed within a batch",)),
    Class(0, "luffy", ("luffy, resumed within a batch",)),
    Class(0, "lora", ("lora, resumed", "lora, reloaded")),
    Class(1e-6, "trl, given rows", ("given rows", "given rows, accumulated", "given rows, 2 processes")),
    Class(1e-6, "given mixed rows", ("given mixed rows, accumulated", "given mixed rows, 2 processes")),
    Class(1e-6, "given mixed rows, one group", ("given mixed rows, groups across 2 processes",)),
)
ON_TWO = [name for one in CLASSES for name in one.others if "2 processes" in name]
STORED = ("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "mentor/gamma", "mentor/branch_rate")
STORED += ("mentor/mixed/reward", "mentor/correction/mean", "mentor/trajectory/shaping")
# Means over the tokens of a part or a process, of which TRL takes the mean however many tokens each has
PER_PART = ("entropy", "sampling/")
PAIRS = [
    pytest.param(one, name, marks=pytest.mark.slow if name in ON_TWO else (), id=name.replace(",", ""))
    for one in CLASSES
    for name in one.others
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every run by its name, once."""

    @cache
    def on_two() -> dict[str, Trajectory]:
        return run_on_two_processes(ON_TWO, tmp_path_factory.mktemp("two"))

    @cache
    def trained(name: str) -> Trajectory:
        return on_two()[name] if name in ON_TWO else run(name, tmp_path_factory.mktemp("run"))

    return trained


@pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.first.replace(",", ""))
def test_numbers_are_the_stored_ones(one, trained):
    if "given" not in one.first and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch draws other numbers here than where they were stored")
    found, expected = stored(trained(one.first), STORED), json.loads(REFERENCES.read_text())[one.first]
    assert found == [pytest.approx(entry, rel=1e-4, abs=1e-6) for entry in expected]
    assert any(entry["grad_norm"] > 1e-3 for entry in expected)


@pytest.mark.parametrize(("one", "name"), PAIRS)
def test_runs_agree(one, name, trained):
    first, other = trained(one.first), trained(name)
    assert len(first.log) == len(other.log)
    for expected, entry in zip(first.log, other.log):
        if one.within:
            expected = {k: value for k, value in expected.items() if not any(part in k for part in PER_PART)}
        found = {k: entry[k] for k in expected}
        assert found == (pytest.approx(expected, rel=one.within, abs=one.within) if one.within else expected)
    assert first.weights.keys() == other.weights.keys()
    for key, value in first.weights.items():
        torch.testing.assert_close(other.weights[key], value, rtol=one.within, atol=one.within, msg=key)


def test_without_mixed_rows_all_rows_are_on_policy(trained):
    for name in ("no mixed rows", "alpha 0"):
        steps = [entry for entry in trained(name).log if "loss" in entry]
        assert steps and all(entry["mentor/on_policy/reward"] == entry["reward"] for entry in steps)
