import threading

import pytest

from mentor_trl.rewards import accuracy_reward, extract_boxed, format_reward, ungradable, ungradable_warning
from mentor_trl.rewards.answers import gold_answer
from mentor_trl.rewards.grading import Grader, set_grader


@pytest.fixture(scope="module", autouse=True)
def grader():
    with Grader(timeout=2.0, num_workers=2) as grader:
        previous = set_grader(grader)
        yield grader
        set_grader(previous)


def reward(solution, answer):
    return accuracy_reward([rf"<think>so</think> It is \boxed{{{answer}}}."], solution=[solution])[0]


CORRECT = [
    ("72", "72"),
    ("073", "73"),
    ("27.0", "27"),
    ("27", "27."),
    ("1,234", "1234"),
    ("1234", r"1{,}234"),
    (r"\frac43", r"\frac{4}{3}"),
    (r"\frac43", r"\dfrac{8}{6}"),
    ("-1./3", r"-\frac13"),
    ("0.5", r"\frac12"),
    (r"\sqrt8", r"2\sqrt{2}"),
    (r"90^\circ", "90"),
    ("90", r"90^\circ"),
    (r"5\text{ cm}", "5"),
    ("5", r"5\text{ cm}"),
    (r"\$18", "18"),
    (r"5\%", r"0.05"),
    ("(1,2]", r"\left(1, 2\right]"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", r"2, 1"),
    ("x=5", "5"),
    ("$x^2-1$", "(x-1)(x+1)"),
    (r"\text{Evelyn}", "Evelyn"),
    ("Evelyn", r"\text{Evelyn}"),
    ("无解", r"\text{无解}"),
    (r"\text{(B)}", "B"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"Adding up gives $x = \boxed{\frac{1}{2}}$.", "0.5"),
    ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,024", "1024"),
    ("So the answer is $7$.", "7"),
    ("So she has 7 apples left.", "7"),
    (72, "72"),
]

WRONG = [
    ("72", "73"),
    ("72", "-72"),
    ("1,234", "1"),
    ("1,2", "1.2"),
    (r"\frac43", r"\frac{3}{4}"),
    (r"\sqrt8", "8"),
    (r"90^\circ", "45"),
    ("(1,2]", "[1,2]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("3", r"3 \text{ or } 4"),
    ("4x+2=5", "5"),
    (r"\text{Evelyn}", r"\text{Karl}"),
    ("72", ""),
]


@pytest.mark.parametrize("solution, answer", CORRECT)
def test_equal_answers_are_rewarded(solution, answer):
    assert reward(solution, answer) == 1.0


@pytest.mark.parametrize("solution, answer", WRONG)
def test_other_answers_are_not(solution, answer):
    assert reward(solution, answer) == 0.0


@pytest.mark.parametrize("solution", ["", None, "???", r"\frac{1}{", r"nothing in \boxed{}"])
def test_an_unparseable_solution_is_skipped(solution):
    assert reward(solution, "72") is None
    assert accuracy_reward(["no box"], solution=[solution]) == [None]


@pytest.mark.parametrize(
    "completion, expected",
    [
        (r"\boxed{1}, no: \boxed{72}", 1.0),
        (r"\boxed{72}, no: \boxed{1}", 0.0),
        (r"<think>\boxed{72}</think> I do not know", 0.0),
        (r"<think>\boxed{1}</think> \boxed{72}", 1.0),
        (r"<think>a</think> \boxed{72} <think>b</think> nothing", 0.0),
        (r"no think block, \boxed{72}", 1.0),
        ("the answer is 72", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_box_after_the_thought_counts(completion, expected):
    assert accuracy_reward([completion], solution=["72"]) == [expected]


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{x \\ {y}}", r"x \\ {y}"),
        (r"\\boxed{5}", "5"),
        (r"line \\\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 5$.", "5"),
        (r"it is \boxed 3.5.", "3.5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{1 + \boxed{2}}", "2"),
        (r"\boxed{5} or \boxed{6", "5"),
        (r"{ {\boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{7}, written with \boxed as asked", "7"),
        (r"\boxed{7}. I was to \boxed a number", "7"),
        (r"\boxed{7} (in \boxed{} as asked)", "7"),
        (r"\boxed{7} and \boxed{ } and \fbox{}", "7"),
        (r"\boxed \frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed C.", "C"),
        (r"\boxed -3", "-3"),
        (r"use \boxed please", None),
        (r"use \boxed \boxed{4}", "4"),
        (r"\boxed{4}\boxed{9}", "9"),
        (r"\boxed{ }", None),
        ("5", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


def test_extract_boxed_is_linear_in_unclosed_boxes():
    assert extract_boxed(r"\boxed{" * 200_000 + "}") is None


@pytest.mark.parametrize(
    "solution, expected",
    [
        (72, "72"),
        (72.0, "72"),
        (["3", 5.0], "3, 5"),
        ([], None),
        (["3", None], None),
        (True, None),
        (None, None),
        (" ", None),
        ("She has 8.\n#### 1,024", "1024"),
        ("So it is ####", None),
        (r"\boxed{1}, no: \boxed{2}.", "2"),
        (r"nothing in \boxed{}", None),
    ],
)
def test_gold_answer(solution, expected):
    assert gold_answer(solution) == expected


def test_messages_are_graded_like_strings():
    conversational = [
        [{"role": "assistant", "content": r"\boxed{72}"}],
        [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{72}"}]}],
        [{"role": "assistant", "content": r"\boxed{1}", "reasoning_content": r"\boxed{72}"}],
        [{"role": "assistant", "content": None}],
        [
            {"role": "assistant", "content": r"\boxed{1}"},
            {"role": "tool", "content": r"\boxed{2}"},
            {"role": "assistant", "content": r"\boxed{72}"},
        ],
    ]
    assert accuracy_reward(conversational, solution=["72"] * 5) == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_a_hanging_answer_costs_only_itself_and_is_logged():
    completions = [r"\boxed{1}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{72}", "none", r"\boxed{1}"]
    solution = ["72", "72", "72", "72", "???"]
    columns, metrics = {}, {}
    rewards = accuracy_reward(
        completions, solution=solution, log_extra=columns.__setitem__, log_metric=metrics.__setitem__, prompts=[""] * 5
    )
    assert rewards == [0.0, 0.0, 1.0, 0.0, None]
    assert metrics == {"mentor/verifier_failures": 1.0, "mentor/unparseable_solutions": 1.0}
    assert columns["accuracy_answer"] == ["1", "9^{9^{9^{9}}}", "72", "[no boxed answer]", "1"]
    assert columns["accuracy_verdict"] == ["wrong", "timeout", "correct", "no answer", "unparseable solution"]


def test_off_the_main_thread():
    rewards = []
    completions = [r"\boxed{72}", r"\boxed{(1+x)^{100000}}", r"\boxed{1}"]
    thread = threading.Thread(target=lambda: rewards.extend(accuracy_reward(completions, solution=["72"] * 3)))
    thread.start()
    thread.join(60)
    assert rewards == [1.0, 0.0, 0.0]


def test_a_missing_column_names_the_mend():
    with pytest.raises(ValueError, match="rename_column.*answer, prompts"):
        accuracy_reward([r"\boxed{72}"], answer=["72"], prompts=[""])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        accuracy_reward([r"\boxed{72}"] * 2, solution=["72"])


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<think>1 + 1</think> It is \boxed{2}.", 1.0),
        ("\n<think>\nlong\nthought\n</think>\n\nIt is\n$$\\boxed{2}$$\n", 1.0),
        (r"<think></think>\boxed{2}", 1.0),
        (r"<think>\boxed{1}</think>\boxed{2}", 1.0),
        (r"<think>\boxed{2}</think> It is 2.", 0.0),
        (r"It is \boxed{2}.", 0.0),
        (r"Well, <think>1 + 1</think> \boxed{2}", 0.0),
        (r"1 + 1</think> \boxed{2}", 0.0),
        (r"<think>1 + 1 \boxed{2}", 0.0),
        (r"<think>a</think><think>b</think> \boxed{2}", 0.0),
        (r"<think>a<think>b</think> \boxed{2}", 0.0),
        (r"<think>a</think>b</think> \boxed{2}", 0.0),
        (r"<think>a</think> \boxed{2", 0.0),
        (r"<think>a</think> \boxed{}", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text, expected):
    assert format_reward([text, [{"role": "assistant", "content": text}]], solution=["2"]) == [expected, expected]


def test_ungradable_golds_are_found_and_named():
    solutions = [
        "72",
        "9 (apples)",
        "",
        "???",
        "No solution",
        r"\frac{1}{",
        None,
        r"\binom{1000000000}{500000000}",
        r"\boxed{}",
        "5!",
        3,
    ]
    assert ungradable(solutions) == [2, 3, 5, 6, 7, 8]
    assert accuracy_reward(["none"] * 11, solution=solutions) == [
        None if index in (2, 3, 5, 6, 7, 8) else 0.0 for index in range(11)
    ]
    warning = ungradable_warning(solutions)
    assert "6 of 11" in warning and "row 3: '???'" in warning and "remove these rows" in warning
    assert ungradable_warning(["72", "No solution"]) is None


def test_training_warns_of_golds_that_cannot_be_graded(caplog):
    from datasets import Dataset

    from mentor_trl.cli.train import _warn_of_ungradable

    rows = Dataset.from_dict({"solution": ["72", "???"]})
    _warn_of_ungradable(rows.select([0]))
    _warn_of_ungradable(rows.to_iterable_dataset())  # cannot be read ahead
    assert not caplog.records
    _warn_of_ungradable(rows)
    assert "1 of 2 solutions" in caplog.text


def test_format_reward_counts_reasoning_parsed_by_the_trainer():
    message = {"role": "assistant", "reasoning_content": "1 + 1", "content": r"\boxed{2}"}
    assert format_reward([[message]]) == [1.0]
