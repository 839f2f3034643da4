"""From columns to prompts and solutions."""

from decimal import Decimal

import pyarrow as pa
import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig

from mentor_trl.cli.arguments import MentorScriptArguments
from mentor_trl.data import (
    MENTOR_SYSTEM_PROMPT,
    DataError,
    build_prompt_dataset,
    load_dataset_dict,
    load_prompt_datasets,
)


GSM8K_ROWS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5", "level": 1},
    {"question": "What is 1000 + 24?", "answer": "It is 1,024.\n#### 1,024", "level": 2},
]


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


def test_a_changed_option_is_not_answered_from_a_cache(write, tmp_path):
    dataset = load_dataset_dict(write("rows.jsonl", GSM8K_ROWS))["train"]
    for system_prompt in ("one", "two"):
        built = build_prompt_dataset(dataset, system_prompt=system_prompt, **GSM8K_OPTIONS)
        assert built[0]["prompt"][0]["content"] == system_prompt


def test_streamed_rows_are_built_as_they_are_read(write, tmp_path):
    path = write("rows.jsonl", GSM8K_ROWS)
    stream = load_dataset_dict(str(path), streaming=True)["train"]
    rows = list(build_prompt_dataset(stream, max_samples=1, **GSM8K_OPTIONS))
    assert [row["solution"] for row in rows] == ["5"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is 2 + 3?"}]


GOOD = {"prompt": "hi", "solution": "#### 1"}
USER = {"role": "user", "content": "q"}


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
        ([{"prompt": "q", "solution": True}], {}, ["row 0", "of type bool", "write it as text"]),
        ([{"prompt": "q", "solution": 1e30}], {}, ["row 0", "column 'solution'", "may have lost digits"]),
        ([{"prompt": "q", "solution": {"a": "1"}}], {}, ["row 0", "a record of ['a']", "`column.field`"]),
        ([{"prompt": "q", "solution": float("nan")}], {}, ["row 0", "empty"]),
        ([{"prompt": {"text": "q"}, "solution": "1"}], {}, ["row 0", "'prompt'", "of type dict", "write it as text"]),
        ([{"prompt": ["q"], "solution": "1"}], {}, ["Message 0", "row 0", "is 'q'", "a 'role' and a 'content'"]),
        ([{"prompt": [USER, None], "solution": "1"}], {}, ["Message 1", "row 0", "is None"]),
        ([{"prompt": [{"from": "human", "value": "q"}], "solution": "1"}], {}, ["the keys 'from', 'value'", "'role'"]),
        ([{"prompt": [{**USER, "role": "human"}], "solution": "1"}], {}, ["row 0", "'prompt'", "'human'", "'user'"]),
        ([{"prompt": [{"role": "user", "content": 3}], "solution": "1"}], {}, ["row 0", "of type int"]),
        ([{"prompt": [{"role": "assistant", "content": ""}], "solution": "1"}], {}, ["row 0", "empty 'content'"]),
        ([{**GOOD, "completions": "x"}], {}, ["a column 'completions'", "TRL", "rename it"]),
        ([{**GOOD, "log_extra": "x"}], {}, ["a column 'log_extra'"]),
        ([{"prompt": "q", "reward_model": {"ground_truth": "1"}}], {}, ["_solution_column reward_model.ground_truth"]),
        (
            [{**GOOD, "a": {"b": "1"}}],
            {"solution_column": "a.c"},
            ["no column 'a.c'", "--dataset_solution_column a.b"],
        ),
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


def script_args(path: str, **options) -> MentorScriptArguments:
    options = {f"dataset_{key}": value for key, value in GSM8K_OPTIONS.items()} | options
    return MentorScriptArguments(dataset_name=str(path), **options)


def test_load_prompt_datasets_with_evaluation_rows(write, tmp_path):
    folder = tmp_path / "rows"
    write("rows/train.jsonl", GSM8K_ROWS)
    write("rows/test.jsonl", GSM8K_ROWS)
    args = script_args(folder, max_eval_samples=1)
    train_rows, eval_rows = load_prompt_datasets(args, DatasetMixtureConfig(), with_eval=True)
    assert (len(train_rows), len(eval_rows)) == (2, 1)
    assert isinstance(train_rows[0]["prompt"], list)
    train_rows, eval_rows = load_prompt_datasets(args, has_chat_template=False)
    assert train_rows[0]["prompt"] == "What is 2 + 3?" and eval_rows is None


def test_load_prompt_datasets_refuses_what_contradicts_itself(write, tmp_path):
    path = write("rows.jsonl", GSM8K_ROWS)
    with pytest.raises(DataError, match="no split 'test', only 'train'"):
        load_prompt_datasets(script_args(path), with_eval=True)
    with pytest.raises(DataError, match="no chat template"):
        load_prompt_datasets(script_args(path, conversational=True), has_chat_template=False)
    with pytest.raises(DataError, match="No dataset is given"):
        load_prompt_datasets(MentorScriptArguments())
    with pytest.raises(DataError, match="keep one of them"):
        load_prompt_datasets(script_args(path), DatasetMixtureConfig(datasets=[{"path": "json"}]))


def test_load_prompt_datasets_takes_a_mixture(write, tmp_path):
    path = write("rows.jsonl", GSM8K_ROWS)
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(path)}] * 2)
    args = script_args(path)
    args.dataset_name = None
    assert len(load_prompt_datasets(args, mixture)[0]) == 4


@pytest.mark.parametrize(
    ("type", "value", "expected"),
    [
        (pa.decimal128(10, 2), Decimal("1.5"), "1.50"),
        (pa.float32(), 7.1, "7.1"),
        (pa.float64(), 7.0, "7"),
        (pa.int64(), 2**63 - 1, "9223372036854775807"),
        (pa.uint64(), 2**64 - 1, "18446744073709551615"),
        (pa.list_(pa.string()), ["7"], "7"),
    ],
)
def test_answers_of_every_type_of_column(type, value, expected):
    dataset = Dataset(pa.table({"prompt": ["q"], "solution": pa.array([value], type)}))
    assert build_prompt_dataset(dataset)["solution"] == [expected]


def test_numbers_beside_a_float_are_whole_and_lost_digits_are_refused(write):
    path = write("rows.jsonl", '{"prompt": "a", "solution": 0.5}\n{"prompt": "b", "solution": 7}\n')
    assert load_prompt_datasets(MentorScriptArguments(dataset_name=path))[0]["solution"] == ["0.5", "7"]
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "solution": [7.0, 12345678901234567890123.0]})
    with pytest.raises(
        DataError, match=r"row 1 of big is the float 1.2345678901234568e\+22, which may have lost digits"
    ):
        build_prompt_dataset(dataset, name="big")


@pytest.mark.parametrize("streaming", [True, False])
def test_fields_of_records_are_columns(write, streaming):
    rows = [{"in": {"prompt": [USER]}, "reward_model": {"ground_truth": str(i), "style": "rule"}} for i in range(2)]
    options = {"dataset_prompt_column": "in.prompt", "dataset_solution_column": "reward_model.ground_truth"}
    args = MentorScriptArguments(dataset_name=write("rows.jsonl", rows), dataset_streaming=streaming, **options)
    built = list(load_prompt_datasets(args)[0])
    assert [row["prompt"] for row in built] == [[USER]] * 2 and [row["solution"] for row in built] == ["0", "1"]
    assert built[0]["reward_model"] == rows[0]["reward_model"]


@pytest.mark.parametrize("content", ["", None])
def test_messages_that_only_call_tools(content):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    prompt = [USER, {"role": "assistant", "content": content, "tool_calls": [call]}, {"role": "tool", "content": ""}]
    (row,) = build([{"prompt": prompt, "solution": "1"}])
    assert [message["content"] for message in row["prompt"]] == ["q", "", ""]
    assert row["prompt"][1]["tool_calls"] == [call]


def test_a_solution_of_its_own_form_is_left_to_the_reward_that_reads_it():
    rows = [{"prompt": "q", "solution": {"tests": ["a", "b"]}}]
    assert build(rows, require_solution=False)[0]["solution"] == rows[0]["solution"]


def test_rows_of_text_and_of_messages_in_one_column(write):
    rows = [{"prompt": "a", "solution": "1"}, {"prompt": [{**USER, "name": "n"}], "solution": "2"}]
    built = load_prompt_datasets(MentorScriptArguments(dataset_name=write("rows.jsonl", rows)))[0]
    assert built["prompt"][:] == [[{"role": "user", "content": "a"}], [{**USER, "name": "n"}]]


def test_a_stream_that_cannot_be_read_is_named(write):
    args = MentorScriptArguments(dataset_name=write("rows.jsonl", '{"prompt": '), dataset_streaming=True)
    with pytest.raises(DataError, match="rows.jsonl.* cannot be read"):
        load_prompt_datasets(args)
