"""The examples of the docstrings. They are fenced as in TRL's, which doctest alone would take for output."""

import doctest
import importlib
import pkgutil

import pytest

import mentor_trl


class _FencedParser(doctest.DocTestParser):
    def parse(self, string: str, name: str = "<string>"):
        return super().parse(string.replace("```python", "").replace("```", ""), name)


MODULES = [module.name for module in pkgutil.walk_packages(mentor_trl.__path__, "mentor_trl.")]


def _run(name: str) -> tuple[int, int]:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(parser=_FencedParser()).find(module, name, globs=dict(vars(module))):
        runner.run(test)
    return runner.summarize(verbose=False)


NEED_VLLM = (
    "mentor_trl.vllm_plugin.runner",
    "mentor_trl.vllm_plugin.worker",
    "mentor_trl.vllm_server.branching",
)


# The worker replaces the standard streams of its process when it is run, and is not meant to be imported by path
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.vllm, pytest.mark.shared_engine] * (name in NEED_VLLM))
        for name in MODULES
        if not name.endswith("grading_worker")
    ],
)
def test_docstring_examples(name: str):
    if name.endswith("evaluation.server"):
        pytest.importorskip("lm_eval")
    assert _run(name).failed == 0


def test_examples_are_found():
    assert sum(_run(name).attempted for name in ("mentor_trl.objective.mixture", "mentor_trl.rollout.types")) > 2
