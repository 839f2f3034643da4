import json
from dataclasses import replace

import pytest

from mentor_trl.evaluation import PAPER_TASKS
from mentor_trl.evaluation.summary import INTERVALS, TaskRun, collect, summarize, to_markdown, write_samples


def make_run(task: str = "aime24", num_samples: int = 4) -> TaskRun:
    correct = [[1] * num_samples, [0] * (num_samples - 1) + [1], [0] * num_samples]
    samples = [
        {
            "doc_id": i,
            "task": task,
            "prompt": "p\u2028",
            "completions": [f"c{j}" for j in range(num_samples)],
            "correct": grades,
            "answer": "1",
            "verdicts": ["correct" if grade else "wrong" for grade in grades],
        }
        for i, grades in enumerate(correct)
    ]
    return TaskRun(task, num_samples, 0.6, {"path": f"org/{task}", "split": "test"}, samples)


def make_results(limit=None, **runs: int) -> dict:
    tasks = {name: summarize(make_run(name, n)) for name, n in (runs or {"aime24": 32, "math500": 1}).items()}
    return collect("org/model", {"backend": "hf", "limit": limit}, tasks)


def test_summary():
    summary = summarize(make_run())
    assert summary["metric"] == "avg@4" and summary["value"] == pytest.approx(5 / 12)
    assert summary["pass_at_k"]["2"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["verdicts"] == {"wrong": 7, "correct": 5}
    assert json.loads(json.dumps(summary)) == summary
    assert summarize(make_run(num_samples=1))["metric"] == "pass@1"


def test_average_only_of_all_nine():
    assert make_results()["average"] is None
    results = make_results(**dict.fromkeys(PAPER_TASKS, 1), gsm8k=4)
    assert results["average"]["value"] == pytest.approx(2 / 3)  # GSM8K is not among the nine


def test_markdown_has_the_papers_rows_and_no_invented_cells():
    lines = to_markdown(make_results()).splitlines()
    assert "| MATH500 | pass@1 | 66.7 | 20.8 to 93.9 |" in lines
    assert "| average of nine, paper: Qwen2.5-7B, MENTOR |  | 46.7 |  |" in lines
    assert "| AIME24, paper: Qwen2.5-7B, MENTOR |  |  |  |  |  | 36.7 |" in lines
    assert "46.7" not in to_markdown(make_results(), paper_model="Llama-3.1-8B")
    assert not any(line.startswith("| average of nine |") for line in lines)
    assert INTERVALS in lines and "95% intervals" in INTERVALS


def test_a_trial_says_so_and_has_no_rows_of_the_paper():
    report = to_markdown(make_results(limit=3))
    assert "A trial: only the first 3 problems of each set" in report and "paper:" not in report


@pytest.mark.parametrize(
    ("room", "remedy"),
    [(100, "no room for more"), (900, "set `max_new_tokens` higher, up to 900"), (None, "higher, if it fits")],
)
def test_truncation_stands_beside_accuracy(room, remedy):
    run = make_run("math500", 1)
    for row, flag in zip(run.samples, (0, 1, 1)):
        row["truncated"] = [flag]
    summary = summarize(replace(run, max_new_tokens=100, room=room))
    report = to_markdown(collect("m", {}, {"math500": summary}))
    assert "| MATH500 | pass@1 | 66.7 | 20.8 to 93.9 | 66.7% |" in report
    assert "MATH500: 2 of 3 completions were cut off at 100 new tokens" in report and remedy in report
    rare = collect("m", {}, {"math500": {**summary, "truncated": 0.04}})
    assert "| 4.0% |" in to_markdown(rare) and "were cut off" not in to_markdown(rare)


def test_samples_come_back(tmp_path):
    run = make_run()
    path = write_samples(run, tmp_path)
    assert path.name == "samples_aime24.jsonl"
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == run.samples
