import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from trl import DatasetMixtureConfig

from mentor_trl.cli.arguments import MentorScriptArguments
from mentor_trl.data import (
    MENTOR_SYSTEM_PROMPT,
    DataError,
    build_prompt_dataset,
    extract_solution,
    load_dataset_dict,
    load_prompt_datasets,
    select_split,
)


GSM8K_ROWS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5", "level": 1},
    {"question": "What is 1000 + 24?", "answer": "It is 1,024.\n#### 1,024", "level": 2},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_give_one_train_split(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", GSM8K_ROWS)
    dataset = load_dataset_dict(str(path))
    assert list(dataset) == ["train"]
    assert dataset["train"].to_list() == GSM8K_ROWS


def test_the_config_of_a_hub_dataset_does_not_disturb_a_local_file_or_folder(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    path = write_rows(folder / "train.jsonl", GSM8K_ROWS)
    assert load_dataset_dict(str(path), config="main")["train"].num_rows == 2
    assert load_dataset_dict(str(folder), config="main")["train"].num_rows == 2


def test_folder_of_files_gives_the_splits_of_their_names(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", GSM8K_ROWS)
    write_rows(folder / "test.jsonl", GSM8K_ROWS[:1])
    assert load_dataset_dict(str(folder)).num_rows == {"train": 2, "test": 1}


@pytest.mark.parametrize("with_splits", [True, False])
def test_folder_of_save_to_disk(tmp_path, with_splits):
    dataset = Dataset.from_list(GSM8K_ROWS)
    (DatasetDict({"train": dataset}) if with_splits else dataset).save_to_disk(tmp_path / "saved")
    assert load_dataset_dict(str(tmp_path / "saved"))["train"].to_list() == GSM8K_ROWS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a #### 5", "5"),
        ("#### 1 #### -2", "-2"),
        ("#### 1,234,567.5", "1234567.5"),
        ("#### $1,000", "$1000"),
        ("#### 1,2", "1,2"),
        ("#### (1,000)", "(1,000)"),
        ("#### ", ""),
        ("no mark", None),
    ],
)
def test_extract_solution(text, expected):
    assert extract_solution(text, "####") == expected


def build(rows, **options):
    return build_prompt_dataset(Dataset.from_list(rows), **options).to_list()


GSM8K_OPTIONS = {"prompt_column": "question", "solution_column": "answer", "solution_delimiter": "####"}


def test_rows_become_messages_and_solutions_and_other_columns_stay():
    first, second = build(GSM8K_ROWS, system_prompt="mentor", **GSM8K_OPTIONS)
    assert first["prompt"] == [
        {"role": "system", "content": MENTOR_SYSTEM_PROMPT},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    assert (first["solution"], second["solution"]) == ("5", "1024")
    assert (second["level"], second["answer"]) == (2, GSM8K_ROWS[1]["answer"])


def test_rows_become_plain_text_for_a_tokenizer_without_chat_template():
    with_system = build(GSM8K_ROWS, system_prompt="Be brief.", conversational=False, **GSM8K_OPTIONS)
    without = build(GSM8K_ROWS, conversational=False, **GSM8K_OPTIONS)
    assert with_system[0]["prompt"] == "Be brief.\n\nWhat is 2 + 3?"
    assert without[0]["prompt"] == "What is 2 + 3?"


def test_messages_are_kept_and_the_system_prompt_replaces_the_rows_own():
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": messages, "solution": "1"}]
    assert build(rows)[0]["prompt"] == messages
    replaced = build(rows, system_prompt="new")[0]["prompt"]
    assert replaced == [{"role": "system", "content": "new"}, {"role": "user", "content": "hi"}]


def test_text_in_the_column_prompt_becomes_messages():
    assert build([{"prompt": "hi", "solution": "1"}])[0]["prompt"] == [{"role": "user", "content": "hi"}]


def test_numbers_become_text_and_solutions_may_be_absent_where_nobody_reads_them():
    assert build([{"prompt": "hi", "solution": 7}])[0]["solution"] == "7"
    assert "solution" not in build([{"prompt": "hi"}], require_solution=False)[0]
    rows = [{"prompt": "hi", "solution": "1"}, {"prompt": "ho", "solution": None}]
    assert [row["solution"] for row in build(rows, require_solution=False)] == ["1", None]


def test_max_samples_keeps_the_first_rows():
    rows = [{"prompt": str(i), "solution": str(i)} for i in range(5)]
    assert [row["solution"] for row in build(rows, max_samples=2)] == ["0", "1"]
    assert len(build(rows, max_samples=9)) == 5


def test_a_changed_option_is_not_answered_from_a_cache(tmp_path):
    dataset = load_dataset_dict(str(write_rows(tmp_path / "rows.jsonl", GSM8K_ROWS)))["train"]
    for system_prompt in ("one", "two"):
        built = build_prompt_dataset(dataset, system_prompt=system_prompt, **GSM8K_OPTIONS)
        assert built[0]["prompt"][0]["content"] == system_prompt


def test_streamed_rows_are_built_as_they_are_read(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GSM8K_ROWS)
    stream = load_dataset_dict(str(path), streaming=True)["train"]
    rows = list(build_prompt_dataset(stream, max_samples=1, **GSM8K_OPTIONS))
    assert [row["solution"] for row in rows] == ["5"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is 2 + 3?"}]


GOOD = {"prompt": "hi", "solution": "#### 1"}


@pytest.mark.parametrize(
    ("rows", "options", "parts"),
    [
        (
            [{"question": "q", "solution": "1"}],
            {},
            ["'prompt'", "['question', 'solution']", "_prompt_column question"],
        ),
        ([{"prompt": "q", "answer": "1"}], {}, ["'solution'", "--dataset_solution_column answer"]),
        (
            GSM8K_ROWS,
            {**GSM8K_OPTIONS, "prompt_column": "questoin"},
            ["'questoin'", "--dataset_prompt_column question"],
        ),
        ([GOOD, {"prompt": "", "solution": "1"}], {}, ["row 1", "empty", "'prompt'"]),
        ([GOOD, {"prompt": "  ", "solution": "1"}], {}, ["row 1", "empty"]),
        ([GOOD, {"prompt": None, "solution": "1"}], {}, ["row 1", "empty"]),
        ([{"prompt": 3, "solution": "1"}], {}, ["row 0", "of type int"]),
        ([{"prompt": [], "solution": "1"}], {}, ["row 0", "no messages"]),
        ([{"prompt": [{"role": "user", "content": ""}], "solution": "1"}], {}, ["row 0", "'content'"]),
        ([{"prompt": [{"role": "user", "content": "a"}]}], {"conversational": False}, ["chat template"]),
        ([GOOD, {"prompt": "q", "solution": None}], {}, ["row 1", "solution", "empty"]),
        ([{"prompt": "q", "solution": ["1"]}], {}, ["row 0", "of type list"]),
        ([GOOD, {"prompt": "q", "solution": "it is 7"}], {"solution_delimiter": "####"}, ["row 1", "####", "it is 7"]),
        ([GOOD, {"prompt": "q", "solution": "so ####"}], {"solution_delimiter": "####"}, ["row 1", "ends with"]),
        ([GOOD], {"max_samples": 0}, ["0", "1 or more"]),
    ],
)
def test_unusable_rows_are_named_with_their_fix(rows, options, parts):
    if "conversational" in options:
        options = {**options, "require_solution": False}
    with pytest.raises(DataError) as error:
        build(rows, name="rows.jsonl", **options)
    for part in [*parts, "" if "max_samples" in options else "rows.jsonl"]:
        assert part in str(error.value)


def test_empty_dataset():
    with pytest.raises(DataError, match="no rows in the dataset"):
        build_prompt_dataset(Dataset.from_dict({"prompt": [], "solution": []}))


def test_unknown_split_lists_the_splits():
    splits = DatasetDict({"train": Dataset.from_list([GOOD]), "validation": Dataset.from_list([GOOD])})
    with pytest.raises(DataError, match="no split 'test', only 'train', 'validation'; set `dataset_test_split`"):
        select_split(splits, "test", "dataset_test_split")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("rows.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("rows.jsonl", "", "the file is empty"),
        ("rows.json", "{", "cannot be read"),
        ("rows.parquet", "not parquet", "cannot be read"),
        ("rows.txt", "a", "files of type '.txt' cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, part):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        load_dataset_dict(str(path))
    assert part in str(error.value) and str(path) in str(error.value)


def test_empty_folder_is_named(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match="is empty; put data files"):
        load_dataset_dict(str(tmp_path / "rows"))


def test_unreachable_hub_dataset_says_what_to_check(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"openai/gsm8k cannot be read: ConnectionError: no route; check the Hub id"):
        load_dataset_dict("openai/gsm8k")


def script_args(path: Path, **options) -> MentorScriptArguments:
    options = {f"dataset_{key}": value for key, value in GSM8K_OPTIONS.items()} | options
    return MentorScriptArguments(dataset_name=str(path), **options)


def test_load_prompt_datasets_with_evaluation_rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", GSM8K_ROWS)
    write_rows(folder / "test.jsonl", GSM8K_ROWS)
    args = script_args(folder, max_eval_samples=1)
    train_rows, eval_rows = load_prompt_datasets(args, DatasetMixtureConfig(), with_eval=True)
    assert (len(train_rows), len(eval_rows)) == (2, 1)
    assert isinstance(train_rows[0]["prompt"], list)
    train_rows, eval_rows = load_prompt_datasets(args, has_chat_template=False)
    assert train_rows[0]["prompt"] == "What is 2 + 3?" and eval_rows is None


def test_load_prompt_datasets_refuses_what_contradicts_itself(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GSM8K_ROWS)
    with pytest.raises(DataError, match="no split 'test', only 'train'"):
        load_prompt_datasets(script_args(path), with_eval=True)
    with pytest.raises(DataError, match="no chat template"):
        load_prompt_datasets(script_args(path, conversational=True), has_chat_template=False)
    with pytest.raises(DataError, match="No dataset is given"):
        load_prompt_datasets(MentorScriptArguments())
    with pytest.raises(DataError, match="keep one of them"):
        load_prompt_datasets(script_args(path), DatasetMixtureConfig(datasets=[{"path": "json"}]))


def test_load_prompt_datasets_takes_a_mixture(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GSM8K_ROWS)
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(path)}] * 2)
    args = script_args(path)
    args.dataset_name = None
    assert len(load_prompt_datasets(args, mixture)[0]) == 4
