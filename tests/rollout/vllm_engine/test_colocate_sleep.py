"""In which order a colocated engine that sleeps is woken, given weights, used and put to sleep."""

import pytest
import torch

from mentor_trl import ColocateSampler


class FakeLLM:
    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake", *tags))

    def collective_rpc(self, method, args=()):
        self.calls.append((method, *(list(arg) if hasattr(arg, "__next__") else arg for arg in args)))
        return [{}]

    def reset_prefix_cache(self):
        self.calls.append(("reset",))


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator.memory, "empty_cache", lambda: None)


def make_sampler(sleeps: bool) -> ColocateSampler:
    sampler = object.__new__(ColocateSampler)
    sampler.llm, sampler.sleeps, sampler._asleep = FakeLLM(), sleeps, set()
    sampler._sleep()
    return sampler


def test_weights_are_woken_first_and_the_cache_only_for_rows():
    sampler = make_sampler(sleeps=True)
    weights = [("a", torch.ones(1))]
    sampler.load_tensors(iter(weights), "v1")
    with sampler.session():
        sampler.llm.calls.append(("rows",))
    with sampler.session():
        sampler.llm.calls.append(("rows",))
    assert sampler.llm.calls == [
        ("sleep", 1),
        ("wake", "weights"),
        ("mentor_load_tensors", weights, "v1"),
        ("reset",),
        ("wake", "kv_cache"),
        ("rows",),
        ("sleep", 1),
        ("wake", "weights", "kv_cache"),
        ("rows",),
        ("sleep", 1),
    ]


def test_the_engine_sleeps_again_after_an_error():
    sampler = make_sampler(sleeps=True)
    with pytest.raises(RuntimeError, match="broken"):
        with sampler.session():
            raise RuntimeError("broken")
    assert sampler.llm.calls[-1] == ("sleep", 1)


def test_an_engine_that_does_not_sleep_is_left_alone():
    sampler = make_sampler(sleeps=False)
    sampler.load_policy("folder", "v1")
    with sampler.session():
        pass
    assert sampler.llm.calls == [("mentor_load_policy", "folder", "v1"), ("reset",)]


def test_weights_that_the_engine_does_not_read_are_read_all_the_same():
    """An adapter stays merged until its generator ends."""
    ended = []

    def weights():
        yield "a", torch.ones(1)
        yield "b", torch.ones(1)
        ended.append(True)

    sampler = make_sampler(sleeps=False)
    sampler.llm.collective_rpc = lambda method, args: next(args[0])
    sampler.load_tensors(weights(), "v1")
    assert ended == [True]
