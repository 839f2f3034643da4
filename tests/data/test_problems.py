import gzip
import json
from pathlib import Path

import pytest

from mentor_trl.data import DataError
from mentor_trl.data.problems import TEST_SETS, TestSet, load_problems
from mentor_trl.evaluation import TASKS
from mentor_trl.evaluation.harness import TASK_FOLDER


GPQA = {
    "Question": "Which is red?",
    "Correct Answer": "blood\n",
    "Incorrect Answer 1": "milk",
    "Incorrect Answer 2": "coal",
    "Incorrect Answer 3": "grass",
}
ARC = {
    "question": "What melts?",
    "choices": {"text": ["ice", "stone"], "label": ["1", "2"]},
    "answerKey": "2",
}


@pytest.fixture(autouse=True)
def _sets(monkeypatch):
    """A set `set` of short answers, and one of each other form by the form's name."""
    monkeypatch.setitem(TEST_SETS, "set", TestSet("org/set", "test", files=("set", "Set")))
    for form in ("gpqa", "arc", "mmlu_pro"):
        monkeypatch.setitem(TEST_SETS, form, TestSet("org/set", "test", form=form, files=("set",)))


def load(folder: Path, *rows: dict, form: str = "short_answer"):
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems("set" if form == "short_answer" else form, data_dir=str(folder))["test"]


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"problem": "q", "answer": r"\frac43", "solution": r"\boxed{1}"}, r"\frac43"),
        ({"problem": "q", "answer": "073"}, "073"),
        ({"problem": "q", "question": "q", "answer": 27.0}, "27"),
        ({"problem": "q", "solution": r"\boxed{1} and \boxed{4.5e33}"}, "4.5e33"),
        ({"question": "q", "answer": "5 + 5 = 10 #### 1,010"}, "1010"),
        ({"question": "q", "final_answer": ["$-1$", "$\\frac{1}{2}$"]}, r"-1, \frac{1}{2}"),
    ],
)
def test_short_answers(tmp_path, row, answer):
    assert load(tmp_path, row)[0] == {"question": "q", "answer": answer, "choices": 0}


def test_gpqa_is_shuffled_in_the_same_way_every_time(tmp_path):
    rows = load(tmp_path, *[GPQA] * 40, form="gpqa")
    again = load(tmp_path, *[GPQA] * 40, form="gpqa")
    assert rows[:] == again[:]
    assert set(rows["answer"]) == set("ABCD")
    for row in rows:
        assert f"\n{row['answer']}. blood\n" in row["question"]
    assert rows[0]["question"].endswith("Answer with the letter of the correct choice.")


def test_arc_with_numbered_choices(tmp_path):
    row = load(tmp_path, ARC, form="arc")[0]
    assert row["answer"] == "B" and row["choices"] == 2
    assert row["question"].startswith("What melts?\n\nA. ice\nB. stone\n\n")


def test_mmlu_pro(tmp_path):
    options = [f"option {i}" for i in range(10)]
    row = load(tmp_path, {"question": "q", "options": options, "answer": "J"}, form="mmlu_pro")[0]
    assert row["answer"] == "J" and "\nJ. option 9\n" in row["question"]


@pytest.mark.parametrize("name", ["set.jsonl.gz", "set.csv", "set.tsv"])
def test_files_of_other_types(tmp_path, name):
    separator = b"\t" if name.endswith("tsv") else b","
    content = (
        gzip.compress(b'{"problem": "q", "answer": "N/A"}\n') if name.endswith("gz") else b"problem,answer\nq,N/A\n"
    )
    (tmp_path / name).write_bytes(content if name.endswith("gz") else content.replace(b",", separator))
    rows = load_problems("set", data_dir=str(tmp_path))["test"]
    assert rows["answer"] == ["N/A"]


def test_missing_file_names_what_is_there(tmp_path):
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"holds no set .*only: other.jsonl"):
        load_problems("set", data_dir=str(tmp_path))


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_problems("set", data_dir=str(tmp_path / "no"))


@pytest.mark.parametrize(
    "row, form, message",
    [
        ({"text": "q"}, "short_answer", "Row 0 of .*set.jsonl has no 'problem', only the columns"),
        ({"problem": "q"}, "short_answer", "has no 'solution'"),
        ({"problem": "q", "solution": "no box"}, "short_answer", "empty question or answer"),
        ({"problem": "q", "answer": True}, "short_answer", "Row 0 of .*set.jsonl cannot be used: The answer is True"),
        ({"problem": "q", "answer": 1e30}, "short_answer", "Row 0 .* may have lost digits"),
        ({"question": "q"}, "gpqa", "has no 'Correct Answer'"),
        ({**GPQA, "Question": None}, "gpqa", "Row 0 of .*set.jsonl .* 'gpqa'"),
        ({**ARC, "answerKey": "9"}, "arc", "Row 0 of .*set.jsonl .* 'arc'"),
    ],
)
def test_bad_rows(tmp_path, row, form, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, row, form=form)


def test_folder_with_other_splits(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"problem": "q", "answer": "1"}\n')
    with pytest.raises(DataError, match="but not 'test'"):
        load_problems("set", data_dir=str(tmp_path))
    monkeypatch.setitem(TEST_SETS, "set", TestSet("org/set", "validation", files=("set",)))
    assert len(load_problems("set", data_dir=str(tmp_path))["test"]) == 1


def test_hub_error_names_the_local_way():
    with pytest.raises(DataError, match="--data_dir"):
        load_problems("set")


def test_every_set_has_a_task_file():
    assert {path.stem for path in TASK_FOLDER.glob("*.yaml")} == set(TASKS)
