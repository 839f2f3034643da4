import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.lines import Run, parse


def _line(arm: str = "mentor", seed: int = 1, accuracy: Sequence[float] = (0.0, 0.5, 1.0), **fields) -> dict:
    """A line as the runner writes it; the curves follow the accuracy."""
    count, accuracy = len(accuracy), list(accuracy)
    steps = [50 * at for at in range(count)]
    line = {
        "study": "one",
        "task": "chain",
        "arm": arm,
        "label": arm.upper(),
        "expert": None if arm in ("grpo", "policy") else "strong",
        "seed": seed,
        "learning_rate": 2e-4,
        "options": {"alpha": 1.0},
        "steps": steps,
        "accuracy": accuracy,
        "pass_at": {"1": accuracy, "4": [min(1.0, 2 * value) for value in accuracy]},
        "entropy": [1.0 - value / 2 for value in accuracy],
        "length": [10.0] * count,
        "distinct": [3 * value for value in accuracy],
        "describe": {"wait": accuracy},
        "cost": [1e9 * step for step in steps],
        "seconds": [0.5 * step for step in steps],
        "expert_tokens": [0.0] * count,
        "metrics": {"mentor/alpha": [1.0] * (count - 1), "mentor/branch_rate": [0.25] * (count - 1)},
        "parameters": {"policy": 100, "expert": 200},
        "versions": {},
    }
    return {**line, **fields}


@pytest.fixture
def line() -> Callable[..., dict]:
    return _line


@pytest.fixture
def run() -> Callable[..., Run]:
    return lambda *args, **fields: parse(_line(*args, **fields))


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[Sequence[dict]], Path]:
    """Write lines, each into the file of its study, and return the folder."""

    def write(lines: Sequence[dict]) -> Path:
        folder = tmp_path / "lines"
        folder.mkdir(exist_ok=True)
        for study in {line["study"] for line in lines}:
            texts = [json.dumps(line) for line in lines if line["study"] == study]
            (folder / f"{study}.jsonl").write_text("\n".join(texts) + "\n")
        return folder

    return write


@pytest.fixture
def config() -> dict:
    """A study of two arms and a third that is planned only."""
    return {
        "arms": {"mentor": {"label": "MENTOR", "expert": True}, "grpo": {"label": "GRPO"}, "gats": {"label": "GATS"}},
        "studies": {"one": [{"tasks": ["chain"], "arms": ["mentor", "grpo", "gats"], "seeds": [1, 2, 3]}]},
        "report": {
            "command": "run {study}",
            "tables": [
                {
                    "name": "head",
                    "title": "Head to head",
                    "study": "one",
                    "task": "chain",
                    "arms": ["grpo", "mentor", "gats"],
                    "baseline": "grpo",
                    "figures": ["steps", "cost", "entropy", "pass_at", "alpha", "outcomes", "branches", "differences"],
                }
            ],
            "questions": [
                {
                    "question": "Which?",
                    "tables": ["head"],
                    "sentence": "MENTOR {head:mentor:difference}, {head:mentor:verdict}; {head:*:solved}.",
                }
            ],
        },
    }


@pytest.fixture
def lines() -> list[dict]:
    """Three seeds of GRPO and two of MENTOR, which is better by .25 and .125 in area."""
    ends = {("grpo", 1): 0.0, ("grpo", 2): 0.5, ("grpo", 3): 1.0, ("mentor", 1): 1.0, ("mentor", 2): 1.0}
    return [_line(arm, seed, np.linspace(0.0, end, 3).tolist()) for (arm, seed), end in ends.items()]
