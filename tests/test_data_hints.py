import pytest
from datasets import Dataset, DatasetDict

from helpers import make_tiny_tokenizer
from mentor_trl.data import DataError
from mentor_trl.errors import SetupError
from mentor_trl.preparation import HintArguments, add_hint, cut_hint, prepare_hints


TRAJECTORY = "<think>abcdef</think>ghij"


def test_the_share_is_of_characters_or_of_tokens_and_of_the_named_part():
    assert cut_hint(TRAJECTORY, 0.5) == "abcde"
    assert cut_hint(TRAJECTORY, 0.5, part="solution") == "gh"
    assert cut_hint(TRAJECTORY, 1.0) == "abcdefghij" and cut_hint(TRAJECTORY, 0.0) == ""
    # Characters are tokens here, but those that the tokenizer does not know count as well.
    assert cut_hint(TRAJECTORY, 0.3, make_tiny_tokenizer()) == "abc"
    assert cut_hint(TRAJECTORY, 0.05, make_tiny_tokenizer()) == ""


def test_plain_and_conversational_prompts():
    hinted = "q\n\n## Hint: Partial Solution\n\nabcde"
    assert add_hint("q", TRAJECTORY) == hinted
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert add_hint(messages, TRAJECTORY) == [messages[0], {"role": "user", "content": hinted}]
    assert messages[1]["content"] == "q"
    blocks = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert "".join(block["text"] for block in add_hint(blocks, TRAJECTORY)[0]["content"]) == hinted
    assert add_hint("q", None) == "q" and add_hint(messages, None) == messages


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fractions_outside_0_and_1_are_refused(fraction):
    with pytest.raises(SetupError, match="between 0 and 1"):
        add_hint("q", TRAJECTORY, fraction)


def test_a_prompt_without_a_user_is_refused():
    with pytest.raises(SetupError, match="user message"):
        add_hint([{"role": "system", "content": "s"}], TRAJECTORY)


def folder(tmp_path, rows) -> str:
    rows = [{"prompt": [{"role": "user", "content": "q"}], "solution": "1", **row} for row in rows]
    splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}
    DatasetDict(splits).save_to_disk(tmp_path / "rows")
    return str(tmp_path / "rows")


def test_hints_are_in_the_training_split_only(tmp_path):
    rows = [{"trajectory": TRAJECTORY}, {"trajectory": None}, {"trajectory": "so \\boxed{1} is the long answer"}]
    source = folder(tmp_path, rows)
    dataset, report = prepare_hints(HintArguments(dataset_name=source))
    assert [row["prompt"][0]["content"].count("## Hint") for row in dataset["train"]] == [1, 0, 1]
    assert dataset["train"]["hint"] == ["abcde", None, "so \\boxed{1} is"]
    assert [row["prompt"][0]["content"] for row in dataset["test"]] == ["q"] * 3
    facts = dict(report.facts)
    assert facts["prompts with a hint"] == "2 of 3" and facts["hints that hold a complete `\\boxed{}`"] == "1"
    dataset, report = prepare_hints(HintArguments(dataset_name=source, drop_without_trajectory=True))
    assert len(dataset["train"]) == report.kept == 2 and len(dataset["test"]) == 3


@pytest.mark.parametrize(
    ("rows", "options", "part"),
    [
        ([{}], {}, "no column 'trajectory'"),
        ([{"trajectory": "a", "hint": "a"}], {}, "hold hints already"),
        ([{"trajectory": ""}], {}, "nothing to take hints from"),
        ([{"trajectory": "ab"}], {"fraction": 0.0}, "`fraction` is 0.0"),
    ],
)
def test_mistakes_are_named(tmp_path, rows, options, part):
    with pytest.raises(DataError, match=part):
        prepare_hints(HintArguments(dataset_name=folder(tmp_path, rows), **options))
