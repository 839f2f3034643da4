import pytest

from mentor_trl.evaluation.graded_rows import (
    choice_letter,
    grade_by_math_verify,
    grade_choice,
    grade_math,
    grade_responses,
    process_results,
)


RIGHT = [
    (r"so $\boxed{\left( 3, \frac{\pi}{2} \right)}.$", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{\frac{4}{3}}", r"\frac43"),
    (r"\boxed{\sqrt{2}}", r"\sqrt2"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    (r"<think>\boxed{1}</think> \boxed{p-q}", "p - q"),
    (r"\boxed{73}", "073"),
    (r"\boxed{27}", "27.0"),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33"),
    (r"\boxed{2.5e-3}", r"0.0025"),
    (r"\boxed{2.9 \cdot 10^{-19}}", "2.9e-19"),
    (r"\boxed{\frac{1}{30000}}", "0.000033333333333333333"),
    (r"\boxed{1,200}", "1200"),
    (r"\boxed{np.arcsin(10/13)}", "np.arcsin(10/13)"),
    (r"\boxed{E_{1}, E_{2}}", "E_{1},E_{2}"),
]


@pytest.mark.parametrize("completion, answer", RIGHT)
def test_right_answers(completion, answer):
    assert grade_math([completion], [answer]) == ["correct"]


@pytest.mark.parametrize(
    "completion, answer, verdict",
    [
        (r"\boxed{74}", "073", "wrong"),
        (r"\boxed{2.7}", "27.0", "wrong"),
        (r"\boxed{1.3e-27}", "2.9e-19", "wrong"),
        (r"\boxed{0}", "2.9e-19", "wrong"),
        (r"\boxed{\frac34}", r"\frac43", "wrong"),
        (r"\boxed{Briana}", r"\text{Evelyn}", "wrong"),
        (r"<think>\boxed{73}</think> I do not know.", "73", "no answer"),
        ("The answer is 73.", "73", "no answer"),
        (r"\boxed{E_{2},E_{3}}", "E_{1},E_{2}", "wrong"),
        (r"\boxed{1}", r"\frac{1}{", "unparseable solution"),
    ],
)
def test_wrong_answers(completion, answer, verdict):
    assert grade_math([completion], [answer]) == [verdict]


@pytest.mark.parametrize("answer", ["C", "c", "(C)", r"\text{C}", r"\mathbf{(C)}", "C.", "C: 12 m", "$C$", "C) a, b"])
def test_letters(answer):
    assert choice_letter(answer) == "C"
    assert grade_choice(rf"<think>\boxed{{A}}</think>\boxed{{{answer}}}", "C") == "correct"


@pytest.mark.parametrize("answer", ["12", "A prime", "Carbon", "CD", r"\frac{1}{2}"])
def test_no_letters(answer):
    assert choice_letter(answer) is None
    assert grade_choice(rf"\boxed{{{answer}}}", "C") == "wrong"


def test_math_verify_alone_knows_no_rules():
    completions = [r"\boxed{18}", r"\boxed{6+9 i}", r"\boxed{41=42}", r"<think>\boxed{3}</think>", ""]
    answers = ["18", "6+9i", "42", "3", "3"]
    assert grade_by_math_verify(completions, answers) == [1, 0, 1, 0, 0]
    assert grade_math(completions, answers) == ["correct", "correct", "wrong", "no answer", "no answer"]


def test_choice_without_box():
    assert grade_choice("C", "C") == "no answer"


def test_a_set_is_graded_in_one_batch_and_in_order(monkeypatch):
    calls = []
    grade = grade_math
    monkeypatch.setattr(
        "mentor_trl.evaluation.graded_rows.grade_math", lambda *args: calls.append(args) or grade(*args)
    )
    docs = [{"answer": "2", "choices": 0}, {"answer": "B", "choices": 4}, {"answer": "3", "choices": 0}]
    resps = [[r"\boxed{2}", r"\boxed{3}"], [r"\boxed{B}", ""], ["", r"\boxed{3}"]]
    verdicts = grade_responses(resps, docs)
    assert verdicts == [["correct", "wrong"], ["correct", "no answer"], ["no answer", "correct"]]
    assert len(calls) == 1
    assert process_results(docs[0], [verdicts[0]]) == {"accuracy": 0.5}
