r"""
How often the gold solutions of an evaluation set are graded as correct, and those of other problems as wrong.

```bash
python benchmarks/grading_agreement.py --data_dir FOLDER --tasks math500 minerva gsm8k aime24 amc23
```

A row's own solution is graded where it ends in a `\boxed{}`, else `\boxed{answer}`. As wrong answers serve `\boxed{}`
with the answer of the next problem whose answer is another text.
"""

import argparse
from pathlib import Path

from mentor_trl.data import load_dataset_dict
from mentor_trl.data.problems import TEST_SETS, find_file, load_problems
from mentor_trl.evaluation import TASKS
from mentor_trl.evaluation.graded_rows import CORRECT, grade_math
from mentor_trl.rewards import extract_boxed


def measure(task: str, data_dir: str) -> None:
    """Print the agreement on one set and every row that disagrees."""
    answers = load_problems(task, data_dir)["test"]["answer"]
    rows = next(iter(load_dataset_dict(str(find_file(Path(data_dir), TEST_SETS[task].files))).values()))
    # AIME's solutions of several authors end in remarks and boxes of their own
    own = task in ("math500", "minerva")
    solutions = [row["solution"] if own and extract_boxed(row["solution"]) else None for row in rows]
    golds = [solution or rf"\boxed{{{answer}}}" for solution, answer in zip(solutions, answers)]
    others = [
        next(other for other in [*answers[i + 1 :], *answers] if other != answer) for i, answer in enumerate(answers)
    ]
    right = grade_math(golds, answers)
    wrong = grade_math([rf"\boxed{{{other}}}" for other in others], answers)
    print(
        f"{TASKS[task]}: {right.count(CORRECT)} of {len(right)} gold solutions correct, "
        f"{wrong.count(CORRECT)} of {len(wrong)} other answers correct"
    )
    for index, (verdict, other, answer) in enumerate(zip(right, others, answers)):
        if verdict != CORRECT:
            print(f"  row {index}, answer {answer!r}: {verdict}")
        if wrong[index] == CORRECT:
            print(f"  row {index}, answer {answer!r}: {other!r} is taken for it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data_dir", required=True, help="folder of the sets")
    parser.add_argument("--tasks", nargs="+", default=["math500", "minerva", "gsm8k", "aime24", "amc23"])
    args = parser.parse_args()
    for task in args.tasks:
        measure(task, args.data_dir)


if __name__ == "__main__":
    main()
