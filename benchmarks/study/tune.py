"""
Choose the learning rate and the coefficient of each arm by the runs of the study `tuning`, whose seeds no other table
uses. What counts is the mean of the area under the curve and of the accuracy at the end: a large learning rate may
rise fast and end badly. An arm keeps its own coefficient unless another is clearly better.

```bash
python -m benchmarks.study.run tuning && python -m benchmarks.study.tune
```
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.study import store
from benchmarks.study.arms import TUNED, Plan


# By how much another coefficient has to be better than an arm's own
CLEARLY = 0.01


def area_under_curve(line: dict[str, Any]) -> float:
    """Mean accuracy over the steps of a run, by the trapezoid rule."""
    steps = line["steps"]
    return float(np.trapezoid(line["accuracy"], x=steps) / (steps[-1] - steps[0]))


def score(line: dict[str, Any]) -> float:
    """What the tuning looks at."""
    return (area_under_curve(line) + line["accuracy"][-1]) / 2


def choose(lines: list[dict[str, Any]], plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """Options with the largest mean score, by task and arm."""
    scores = defaultdict(list)
    for line in lines:
        alternatives = plan.arm(line["arm"])["alternatives"]
        names = ("learning_rate", *alternatives)
        point = tuple((name, line["options"][name]) for name in names if name in line["options"])
        scores[line["task"], line["arm"], point].append(score(line))
    best: dict[tuple[str, str], tuple[float, tuple]] = {}
    for (task, arm, point), values in scores.items():
        ((name, others),) = plan.arm(arm)["alternatives"].items()
        handicap = CLEARLY if dict(point).get(name) in others else 0.0
        best[task, arm] = max(best.get((task, arm), (-1.0, ())), (float(np.mean(values)) - handicap, point))
    chosen: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (task, arm), (_, point) in sorted(best.items()):
        chosen[task][arm] = dict(point)
    return dict(chosen)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the JSON lines")
    options = parser.parse_args(argv)
    chosen = choose(store.read(options.results / "tuning.jsonl"), Plan.read())
    TUNED.write_text(f"# Chosen by `python -m benchmarks.study.tune`.\n{yaml.safe_dump(chosen)}")
    print(TUNED.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
