import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from mentor_trl.analysis.rates import REASONING_WORDS, pass_at_k_curves, word_rates
from mentor_trl.analysis.samples import Sample, SampleSet, keep_tasks, read_samples
from mentor_trl.errors import SetupError
from mentor_trl.evaluation.pass_at_k import estimate


TEXTS = [
    "Wait, let me check. Since 2 < 3, we find x.",
    "Okay. But then, however, CONSIDER the given case; therefore done.",
    "await checks; thens but_ given2 Sinces",
    "wait wait wait\nbut",
    "Alternatively: verify. Similarly (then).",
    "",
    "“But” it's a butt—wait…",
]


def make_set(label: str, rows: list[list[int]], task: str = "t") -> SampleSet:
    samples = [Sample(str(i), task, ["x"] * len(row), row) for i, row in enumerate(rows)]
    return SampleSet(f"{label}.jsonl", label, samples)


def count_words(texts: list[str]) -> dict[str, int]:
    rates = word_rates([SampleSet("a", "a", [Sample(str(i), "t", [text]) for i, text in enumerate(texts)])])
    return dict(zip(rates["word"], rates["count"]))


def test_words_against_a_count_by_splitting():
    for word, count in count_words(TEXTS).items():
        assert count == sum(word in re.split(r"[^A-Za-z0-9_]+", text.lower()) for text in TEXTS), word
    assert len(REASONING_WORDS) == 14


@pytest.mark.skipif(shutil.which("grep") is None, reason="no grep")
def test_words_against_grep():
    lines = "".join(text.replace("\n", " ") + "\n" for text in TEXTS)
    for word, count in count_words(TEXTS).items():
        done = subprocess.run(["grep", "-c", "-w", "-i", word], input=lines, capture_output=True, text=True)
        assert int(done.stdout) == count, word


def test_rates_take_the_first_response_unless_told_otherwise():
    samples = [Sample("0", "t", ["wait", "no"], None), Sample("1", "t", ["no", "wait"], None)]
    sets = [SampleSet("a", "a", samples)]
    first, every = word_rates(sets, ["wait"]), word_rates(sets, ["wait"], all_completions=True)
    assert (first["rate"][0], first["responses"][0]) == (0.5, 2)
    assert (every["rate"][0], every["responses"][0]) == (0.5, 4)
    assert 0.0 < every["low"][0] < 0.5 < every["high"][0] < 1.0


def test_tables_of_training_have_sources(tmp_path):
    rows = {"step": [1, 1], "prompt": ["p", "p"], "completion": ["wait", [{"role": "assistant", "content": "no"}]]}
    pd.DataFrame({**rows, "source": ["mixed", "on_policy"]}).iloc[:1].to_parquet(tmp_path / "c_1.parquet")
    pd.DataFrame({"completion": [rows["completion"][1]], "source": ["on_policy"]}).to_parquet(tmp_path / "c_2.parquet")
    sets = read_samples([tmp_path])
    assert word_rates(sets, ["wait"])["rate"].tolist() == [0.5]
    assert word_rates(sets, ["wait"], source="mixed")["rate"].tolist() == [1.0]
    with pytest.raises(SetupError, match="mixed, on_policy"):
        word_rates(sets, ["wait"], source="eval")


def test_curves_by_hand():
    curves = pass_at_k_curves([make_set("a", [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])])
    assert curves["k"].tolist() == [1, 2, 4]
    assert curves["value"].tolist() == pytest.approx([1.25 / 3, 1.5 / 3, 2 / 3])
    assert (curves["low"] < curves["value"]).all() and (curves["value"] < curves["high"]).all()


def test_curves_have_the_intervals_of_the_evaluation():
    rows = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    # Where prompts agree, the number of samples counts
    for correct in (rows, [[1, 0, 1, 0]] * 20):
        for found in pass_at_k_curves([make_set("a", correct)]).to_dict("records"):
            expected = estimate(correct, found["k"])
            assert (found["value"], found["low"], found["high"]) == (expected.value, expected.low, expected.high)
    # Two seeds of the same responses are not twice the prompts
    (twice,) = pass_at_k_curves([make_set("a", rows), make_set("a", rows)], ks=[1]).to_dict("records")
    expected = estimate([row + row for row in rows])
    assert (twice["value"], twice["low"], twice["high"]) == (expected.value, expected.low, expected.high)


def test_responses_to_one_prompt_are_not_independent():
    rows = [["wait"] * 8] * 10 + [["no"] * 8] * 10
    sets = [SampleSet("a", "a", [Sample(str(i), "t", row) for i, row in enumerate(rows)])]
    (first,) = word_rates(sets, ["wait"]).to_dict("records")
    (every,) = word_rates(sets, ["wait"], all_completions=True).to_dict("records")
    assert (every["responses"], every["count"], every["rate"]) == (160, 80, 0.5)
    # Eight times the responses, but nothing new about other prompts
    assert every["high"] - every["low"] > 0.9 * (first["high"] - first["low"])


def test_seeds_are_averaged_by_prompt():
    curves = pass_at_k_curves([make_set("a", [[1, 1], [0, 0]]), make_set("a", [[0, 0], [0, 0]])], ks=[1])
    assert curves["value"].tolist() == [0.25] and curves["prompts"].tolist() == [2]


def test_a_set_that_nobody_solves_has_an_interval():
    (row,) = pass_at_k_curves([make_set("a", [[0]] * 30)]).to_dict("records")
    assert row["value"] == row["low"] == 0.0 and 0.05 < row["high"] < 0.2


def test_errors_of_curves():
    with pytest.raises(SetupError, match="pass@4 of 'a' on 't'.*2 samples"):
        pass_at_k_curves([make_set("a", [[1, 0]])], ks=[4])
    with pytest.raises(SetupError, match="no `correct` for prompt '0'"):
        pass_at_k_curves([SampleSet("f", "a", [Sample("0", "t", ["x"])])])
    twice = SampleSet("f", "a", [Sample("0", "t", ["x"], [1]), Sample("0", "t", ["x"], [0])])
    with pytest.raises(SetupError, match="two rows of prompt '0'"):
        pass_at_k_curves([twice])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "are empty"),
        ("{\n", "line 1 is not valid JSON"),
        ("[]\n", "holds a list"),
        ('{"text": "x"}\n', "neither `completions`.*`text`"),
        ('{"completions": []}\n', "empty list"),
        ('{"completions": ["x"], "correct": [1, 0]}\n', "1 completions and 2"),
    ],
)
def test_files_that_are_no_samples(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(SetupError, match=message):
        read_samples([tmp_path / "s.jsonl"])


def test_a_table_that_is_no_parquet(tmp_path):
    (tmp_path / "s.parquet").write_text("PAR")
    with pytest.raises(SetupError, match="s.parquet cannot be read as parquet"):
        read_samples([tmp_path])


def test_line_separators_inside_texts_do_not_end_a_row(tmp_path):
    row = {"doc_id": 3, "task": "t", "completions": ["a\u2028b"], "correct": [1]}
    (tmp_path / "s.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (one,) = read_samples([tmp_path / "s.jsonl"])
    assert one.label == "s" and one.samples == [Sample("3", "t", ["a\u2028b"], [1])]
    assert keep_tasks([one], ["t"])[0].samples == one.samples
    with pytest.raises(SetupError, match="no task 'u'; they have t"):
        keep_tasks([one], ["u"])
