import pytest
from datasets import Dataset, DatasetDict

from helpers import make_tiny_tokenizer
from mentor_trl.cli.arguments import MentorScriptArguments
from mentor_trl.data import DataError, add_hint, cut_hint, load_prompt_datasets
from mentor_trl.data.preparation import HintArguments, prepare_hints
from mentor_trl.errors import SetupError
from trainer_helpers import letters_reward, make_trainer


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
        ([{"trajectory": ""}], {}, "has a trajectory in the column"),
        ([{"trajectory": "ab"}], {"fraction": 0.0}, "`fraction` is 0.0"),
    ],
)
def test_mistakes_are_named(tmp_path, rows, options, part):
    with pytest.raises(DataError, match=part):
        prepare_hints(HintArguments(dataset_name=folder(tmp_path, rows), **options))


# Hints on the way to the trainer


@pytest.mark.parametrize("has_chat_template", [True, False])
def test_hints_are_in_the_training_rows_only(tmp_path, has_chat_template):
    rows = [{"prompt": "q", "trajectory": TRAJECTORY}, {"prompt": "p", "trajectory": None}]
    args = MentorScriptArguments(dataset_name=folder(tmp_path, rows), hint_fraction=0.5, system_prompt="s")
    with pytest.warns(UserWarning, match=r"1 of 2 rows of .*rows \(split 'train'\) have no trajectory, and keep"):
        train, test = load_prompt_datasets(args, has_chat_template=has_chat_template, with_eval=True)
    texts = [[p if isinstance(p, str) else p[-1]["content"] for p in split["prompt"]] for split in (train, test)]
    system = "" if has_chat_template else "s\n\n"
    assert texts[0] == [f"{system}q\n\n## Hint: Partial Solution\n\nabcde", f"{system}p"]
    assert texts[1] == [f"{system}q", f"{system}p"]
    assert train["hint"] == ["abcde", None] and train["trajectory"] == [TRAJECTORY, None]
    if has_chat_template:
        assert train[0]["prompt"][0] == {"role": "system", "content": "s"}


def test_without_a_fraction_the_prompts_are_plain_and_trajectories_stay(tmp_path):
    rows = [{"prompt": "q", "trajectory": TRAJECTORY}]
    train, test = load_prompt_datasets(MentorScriptArguments(dataset_name=folder(tmp_path, rows)))
    assert train[0]["prompt"] == [{"role": "user", "content": "q"}] and train[0]["trajectory"] == TRAJECTORY


def test_hints_from_another_column(tmp_path):
    rows = [{"prompt": "q", "steps": "ab", "expert": {"text": "cd"}}]
    for column, hint in (("steps", "ab"), ("expert.text", "cd")):
        options = {"hint_fraction": 1.0, "dataset_trajectory_column": column, "conversational": False}
        args = MentorScriptArguments(dataset_name=folder(tmp_path, rows), **options)
        assert load_prompt_datasets(args)[0]["hint"] == [hint]


@pytest.mark.parametrize(
    ("row", "options", "part"),
    [
        ({}, {}, "no column 'trajectory' in .*set `dataset_trajectory_column` to the column that holds"),
        ({"trajectory": "a", "hint": "a"}, {}, "hold hints already; unset `hint_fraction`"),
        ({"trajectory": ""}, {}, "No row of .* has a trajectory in the column 'trajectory'"),
        ({"trajectory": "ab"}, {"hint_fraction": 0.0}, "`hint_fraction` is 0.0"),
        ({"trajectory": "ab"}, {"hint_fraction": 1.5}, "above 0 and up to 1"),
        ({"trajectory": "ab"}, {"dataset_streaming": True}, "set `dataset_streaming` to false"),
        ({"trajectory": ["ab"]}, {}, "column 'trajectory'.* of row 0 of .* is of type list, not text"),
    ],
)
def test_mistakes_of_the_training_options_are_named(tmp_path, row, options, part):
    args = MentorScriptArguments(dataset_name=folder(tmp_path, [row]), **{"hint_fraction": 0.5, **options})
    with pytest.raises(DataError, match=part):
        load_prompt_datasets(args)


def test_a_model_is_trained_with_hints_and_evaluated_without(tmp_path):
    rows = [{"prompt": f"{i}", "trajectory": "abcdef"} for i in range(4)]
    train, test = load_prompt_datasets(
        MentorScriptArguments(dataset_name=folder(tmp_path, rows), hint_fraction=0.5), with_eval=True
    )
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append({prompt[-1]["content"] for prompt in prompts})
        return letters_reward(completions)

    trainer = make_trainer(
        tmp_path / "out",
        reward_funcs=reward,
        num_mixed_generations=0,
        train_dataset=train,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        trainer_kwargs={"eval_dataset": test},
    )
    trainer.train()
    question = next(iter(seen[0]))
    assert question[1:] == "\n\n## Hint: Partial Solution\n\nabc" and len(seen[0]) == 1
    assert set().union(*seen[1:]) == {"0", "1", "2", "3"}
