"""A folder in which the commands of the documentation run: what they name is there, tiny, and made on the spot."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from mentor_trl.data.problems import TEST_SETS


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += sorted([*ROOT.glob("examples/**/README.md"), *ROOT.glob("recipes/**/README.md")])
PAGES = [page for page in PAGES if "reference" not in page.parts]  # made from the code

# Names of the Hub and of folders that a reader has: a folder of this name is what a library takes first
POLICIES = ["HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-3B", "outputs/mentor"]
POLICIES += ["SmolLM2-135M-Instruct"]
EXPERTS = ["HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "open-r1/OpenR1-Qwen-7B"]
EXPERTS += ["experts/SmolLM2-360M-gsm8k"]

CHOICES = {"options": ["a", "b"], "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
CHOICES |= {"Question": "which?", "Correct Answer": "b", **{f"Incorrect Answer {i}": "a" for i in (1, 2, 3)}}


def problem(i: int) -> dict[str, Any]:
    """A row with the columns of every dataset that the pages name."""
    text, reply = f"what is {i}+{i}?", f"<think>{i} and {i}</think>\\boxed{{{2 * i}}}"
    row = {"problem": text, "question": text, "solution": f"it is \\boxed{{{2 * i}}}", "answer": f"{2 * i}"}
    return {**row, "level": 3 + i % 3, "prompt": text, "trajectory": reply, "trajectories": [reply]}


def make_world(folder: Path, text: str, policy: Path, expert: Path) -> None:
    """Fill `folder` with what a page of this `text` takes for granted; what its commands make is left to them."""
    for name in ("recipes", "benchmarks", "mentor_trl"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", folder / "examples")
    for names, source in ((POLICIES, policy), (EXPERTS, expert)):
        for name in names:
            if f"--output_dir {name}" not in text:
                shutil.copytree(source, folder / name)
    train, test = [problem(i) for i in range(8)], [problem(i) for i in (90, 91)]
    for found in TEST_SETS.values():
        choices = [{**row, "answer": "B", **CHOICES} for row in test]
        write_rows(folder / found.path, {found.split: test if found.form == "short_answer" else choices})
    graded = [{"question": row["question"], "answer": f"so #### {row['answer']}"} for row in [*train, *test]]
    write_rows(folder / "openai/gsm8k", {"train": graded[:8], "test": graded[8:]})
    # As the Hub's has it
    (folder / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )
    write_rows(folder / "nlile/hendrycks-MATH-benchmark", {"train": train})
    for name in ("data/math", "data/math-expert"):
        if f"--output_dir {name}" not in text:
            write_rows(folder / name, {"train": train})
    write_rows(folder / "data", {"math500": test, "aime24": test})
    (rows,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/training.md").read_text(), re.MULTILINE | re.DOTALL)
    (folder / "my_problems.jsonl").write_text(rows)


def write_rows(folder: Path, splits: dict[str, list[dict]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
