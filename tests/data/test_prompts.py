import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value, load_dataset, load_from_disk

from mentor_trl.cli import data as script
from mentor_trl.cli.arguments import MentorScriptArguments
from mentor_trl.data import MENTOR_SYSTEM_PROMPT, DataError, load_prompt_datasets
from mentor_trl.data.preparation import PRESETS, PromptArguments, normalize_problem, prepare_prompts
from mentor_trl.data.preparation.sources import parse_test_set
from mentor_trl.data.problems import TEST_SETS, TestSet


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MATH_ROWS = [
    {"problem": "What is $1 + 1$?", "level": "Level 1", "solution": "It is $\\boxed{2}$."},
    {"problem": "What is $\\dfrac{1}{2}$ of $1,000$?", "level": "Level 3", "solution": "\\boxed{500}"},
    {"problem": "Find $x^2$ for $x = 3$.", "level": "Level 4", "solution": "First $3$, then $\\boxed{9}$"},
    {"problem": "find $x^{2}$ for $x=3$", "level": "Level 4", "solution": "\\boxed{9}"},
    {"problem": "No answer here", "level": "Level 5", "solution": "It is nine."},
    {"problem": "  ", "level": "Level 5", "solution": "\\boxed{9}"},
    {"problem": "What is $2 + 2$?", "level": 5, "solution": "\\boxed{4}"},
    {"problem": "Which level?", "level": "Level ?", "solution": "\\boxed{4}"},
]
TEST_ROWS = [{"problem": "what is \\(\\frac12\\) of $1000$", "answer": 500.0, "level": 2}]


def prepare(tmp_path, rows, preset="math", **options):
    options = {"test_sets": ["none"], "eval_set": "none", "dataset_config": None, **options}
    rows = [{**row, "level": str(row["level"])} if "level" in row else row for row in rows]
    source = write(tmp_path / "rows.jsonl", rows)
    return prepare_prompts(PromptArguments(**{**PRESETS[preset], "dataset_name": source, **options}))


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("What is $x^{2}$ ?", "what is \\( x^2 \\)", True),
        ("\\left( \\tfrac{3}{4} \\right)", "(\\frac34)", True),
        ("Janet’s 1,000 eggs", "janet's 1000 eggs", True),
        ("\\text{if } x", "\\textbf{if} x", True),
        ("x_{12}", "x_12", False),
        ("\\frac{1}{23}", "\\frac{12}{3}", False),
        ("(1, 2)", "(12)", False),
        ("1.5", "15", False),
        ("3 - 4", "3 + 4", False),
        ("\\leftarrow 3", "arrow 3", False),
    ],
)
def test_problems_are_compared_by_what_they_say(first, second, equal):
    assert (normalize_problem(first) == normalize_problem(second)) is equal


def test_every_dropped_row_is_on_the_account(tmp_path):
    test = write(tmp_path / "test.jsonl", TEST_ROWS)
    dataset, report = prepare(tmp_path, MATH_ROWS, eval_set=f"math500={test}", test_sets=["math500"])
    assert dict(report.steps) == {
        "level unknown": 1,
        "level not in [3, 4, 5]": 1,
        "no problem text": 1,
        "no answer": 1,
        "problem of math500 (1 problems)": 1,
        "problem occurred before": 1,
    }
    assert report.loaded == 8 and report.kept == len(dataset["train"]) == 2
    first, second = dataset["train"]
    assert first["prompt"][0] == {"role": "system", "content": MENTOR_SYSTEM_PROMPT}
    assert first["prompt"][1] == {"role": "user", "content": "Find $x^2$ for $x = 3$."}
    assert (first["solution"], first["level"], first["source"]) == ("9", 4, "rows.jsonl")
    assert (second["solution"], second["level"]) == ("4", 5)
    (row,) = dataset["test"]
    assert (row["solution"], row["level"], row["source"]) == ("500", 2, "math500")
    assert row["prompt"][0]["content"] == MENTOR_SYSTEM_PROMPT


def test_duplicates_are_counted_even_where_they_are_kept(tmp_path):
    rows = [*MATH_ROWS, {"problem": "Find $x^2$ for $x = 3$.", "level": 4, "solution": "\\boxed{8}"}]
    dataset, report = prepare(tmp_path, rows, keep_duplicates=True, system_prompt="none", conversational=False)
    facts = dict(report.facts)
    assert facts["rows whose problem occurred before"] == "2 (kept)"
    assert facts["problems that occur with different answers"] == "1"
    assert dataset["train"]["prompt"][1] == dataset["train"]["prompt"][-1] == "Find $x^2$ for $x = 3$."


def test_gsm8k_and_custom_columns(tmp_path):
    rows = [
        {"question": "What is 1 + 1?", "answer": "2\n#### 1,002", "other": 7, "reply": "<think>a</think>\\boxed{2}"}
    ]
    assert prepare(tmp_path, rows, "gsm8k")[0]["train"]["solution"] == ["1002"]
    dataset, report = prepare(
        tmp_path, rows, "custom", solution_delimiter="####", trajectory_column="reply", keep_columns=["other"]
    )
    assert dataset["train"][0]["trajectory"] == rows[0]["reply"] and dataset["train"][0]["other"] == 7
    assert dict(report.facts)["of these in the form `<think>...</think>...\\boxed{...}`"] == "1"


def test_answers_that_cannot_be_verified(tmp_path):
    rows = [{"problem": "a", "answer": "4"}, {"problem": "b", "answer": "???"}]
    dataset, report = prepare(tmp_path, rows, "custom", verifiable_only=True)
    assert dataset["train"]["solution"] == ["4"]
    assert dict(report.steps)["answer that math-verify cannot parse"] == 1


OPENR1_ROWS = [
    {"problem": "one", "answer": "1", "generations": ["wrong", "long" * 9, "ok", "two"],
     "correctness_math_verify": [False, True, True, True], "is_reasoning_complete": [True] * 4, "source": "aops"},
    {"problem": "two", "answer": "2", "generations": ["x"], "correctness_math_verify": [False],
     "is_reasoning_complete": [True], "source": "aops"},
    {"problem": "three", "answer": "3", "generations": ["x"], "correctness_math_verify": [True],
     "is_reasoning_complete": [False], "source": "aops"},
    {"problem": "four", "answer": "4", "generations": ["y" * 11], "correctness_math_verify": [True],
     "is_reasoning_complete": [True], "source": "aops"},
]  # fmt: skip


def test_openr1_keeps_correct_complete_and_short_generations(tmp_path, tiny_model_dir):
    dataset, report = prepare(
        tmp_path,
        OPENR1_ROWS,
        "openr1",
        tokenizer=str(tiny_model_dir),
        max_response_tokens=10,
        all_generations=True,
    )
    (row,) = dataset["train"]
    assert (row["trajectory"], row["trajectories"], row["solution"]) == ("ok", ["ok", "two"], "1")
    assert row["source"] == "rows.jsonl/aops"
    assert list(dict(report.steps).values())[-3:] == [1, 1, 1]


def test_long_prompts_are_measured_with_the_chat_template(tmp_path, tiny_model_dir):
    rows = [{"problem": "a" * 5, "answer": "1"}, {"problem": "a" * 6, "answer": "1"}]
    # beginning of text, user, five letters, assistant
    options = {"tokenizer": str(tiny_model_dir), "max_prompt_tokens": 8, "system_prompt": "none"}
    dataset, report = prepare(tmp_path, rows, "custom", **options)
    assert len(dataset["train"]) == 1 and dict(report.steps)["prompt of more than 8 tokens"] == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"levels": [3, 7]}, ["[7]", "[1, 3, 4, 5]", "`levels`"]),
        ({"prompt_column": "query"}, ["'query'", "`prompt_column`"]),
        ({"solution_column": "answer"}, ["'answer'", "`solution_column`"]),
        ({"keep_columns": ["subject"]}, ["'subject'", "`keep_columns`"]),
        ({"keep_columns": ["solution"]}, ["`keep_columns`", "'solution'", "made here"]),
        ({"num_proc": 0}, ["`num_proc` is 0"]),
        ({"level_column": None}, ["`level_column`"]),
        ({"test_sets": ["math50"]}, ["'math50'", "did you mean 'math500'?"]),
        ({"test_sets": ["math500=/absent.jsonl"]}, ["/absent.jsonl does not exist", "`test_sets`"]),
        ({"test_sets": ["math500="]}, ["NAME=PATH"]),
        ({"dataset_split": "test"}, ["no split 'test'", "`dataset_split`"]),
        ({"dataset_name": "/absent.jsonl"}, ["/absent.jsonl does not exist"]),
        ({"max_samples": 0}, ["`max_samples` is 0"]),
        ({"max_prompt_tokens": 5}, ["`tokenizer`"]),
        ({"max_prompt_tokens": 5, "tokenizer": "/absent"}, ["No tokenizer", "there is no folder /absent"]),
        ({"generations": True, "tokenizer": "x", "trajectory_column": "y"}, ["set one of them"]),
        ({"all_generations": True}, ["`all_generations` needs `generations`"]),
        ({"levels": [1], "solution_delimiter": "####"}, ["No row", "no answer"]),
    ],
)
def test_mistakes_are_named(tmp_path, options, parts):
    with pytest.raises(DataError) as error:
        prepare(tmp_path, MATH_ROWS, **options)
    assert all(part in str(error.value) for part in parts), error.value


def test_test_sets_are_named_or_given_by_path():
    assert parse_test_set("olympiadbench", "test_sets") == ("olympiadbench", TEST_SETS["olympiadbench"])
    assert parse_test_set("gpqa", "test_sets") == ("gpqa_diamond", TEST_SETS["gpqa_diamond"])
    # A copy keeps the form of its rows, and neither configuration nor split.
    assert parse_test_set("arc=copy.jsonl", "test_sets") == ("arc_challenge", TestSet("copy.jsonl", form="arc"))
    assert parse_test_set("org/set", "test_sets") == ("set", TestSet("org/set"))


def test_every_test_set_of_the_presets_is_known():
    names = {name for preset in PRESETS.values() for name in preset.get("test_sets", [])}
    assert names and names <= set(TEST_SETS)


def test_multiple_choice_questions_come_with_their_choices(tmp_path):
    row = {"question": "What melts?", "choices": {"text": ["ice", "stone"], "label": ["A", "B"]}, "answerKey": "A"}
    test = write(tmp_path / "test.jsonl", [row])
    rows = [{"problem": "What melts?", "answer": "ice"}, {"problem": "What is 1?", "answer": "1"}]
    dataset, report = prepare(tmp_path, rows, "custom", eval_set=f"arc={test}", system_prompt="none")
    assert report.kept == 1 and dataset["test"]["solution"] == ["A"]
    assert dataset["test"][0]["prompt"][0]["content"].startswith("What melts?\n\nA. ice\nB. stone")


def run(tmp_path, *flags, rows=MATH_ROWS):
    source = write(tmp_path / "rows.jsonl", [{**row, "level": str(row["level"])} for row in rows])
    test = write(tmp_path / "test.jsonl", TEST_ROWS)
    argv = ["math", "--dataset_name", source, "--test_sets", "none", "--eval_set", f"math500={test}", *flags]
    return script.run(argv)


@pytest.mark.parametrize("output_format", ["parquet", "arrow"])
def test_the_folder_is_read_by_the_libraries_and_by_the_trainer(tmp_path, output_format, capsys):
    folder = str(tmp_path / "out")
    assert run(tmp_path, "--output_dir", folder, "--output_format", output_format) == 0
    read = load_dataset(folder) if output_format == "parquet" else load_from_disk(folder)
    assert read.num_rows == {"train": 2, "test": 1}
    train, test = load_prompt_datasets(MentorScriptArguments(dataset_name=folder), with_eval=True)
    assert train["solution"] == ["9", "4"] and test["solution"] == ["500"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mentor-trl data math --dataset_name" in card and "| level unknown | 1 | 7 |" in card
    assert "problem of math500" in capsys.readouterr().err


def test_an_output_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--output_dir", str(tmp_path / "out"))
    assert stop.value.code == 2 and "already exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "No output is given" in capsys.readouterr().err


def test_upload_is_the_folder(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, *args, **kwargs):
            calls.append((args, kwargs))

        def upload_folder(self, *, folder_path, **kwargs):
            names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
            calls.append((names, kwargs))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert run(tmp_path, "--push_to_hub", "me/math", "--private") == 0
    (created, options), (names, upload) = calls
    assert created == ("me/math",) and options == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert names == {"README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}
    assert upload["repo_id"] == "me/math"


def test_a_failed_upload_leaves_the_folder(tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise OSError("no way")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(SystemExit):
        run(tmp_path, "--push_to_hub", "me/math", "--output_dir", str(tmp_path / "out"))
    assert "could not be uploaded" in capsys.readouterr().err and (tmp_path / "out" / "data").is_dir()


def test_unknown_options_are_named_and_every_command_has_help(capsys):
    with pytest.raises(SystemExit):
        script.run(["math", "--level", "3"])
    assert "did you mean 'levels'" in capsys.readouterr().err
    assert script.run([]) == 0
    overview = capsys.readouterr().out
    for name in script.COMMANDS:
        assert name in overview
        with pytest.raises(SystemExit) as stop:
            script.run([name, "--help"])
        assert stop.value.code == 0 and "--output_dir" in capsys.readouterr().out


def test_messages_are_taken_as_they_are(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "What is 1?"}], "answer": "1"}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    test = write(tmp_path / "test.jsonl", [{"question": "what is 2"}])
    args = PromptArguments(dataset_name=str(path), system_prompt="none", test_sets=[test])
    assert prepare_prompts(args)[0]["train"]["prompt"] == [rows[0]["prompt"]]
    write(tmp_path / "test.jsonl", [{"question": "what is 1"}])
    with pytest.raises(DataError, match="No row"):
        prepare_prompts(args)


def test_fields_of_records_are_columns(tmp_path):
    rows = [
        {"in": {"prompt": "What is 1?", "level": 3}, "reward_model": {"ground_truth": "1"}, "reply": {"text": "t"}}
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    options = {
        "prompt_column": "in.prompt",
        "solution_column": "reward_model.ground_truth",
        "level_column": "in.level",
    }
    args = PromptArguments(path, trajectory_column="reply.text", keep_columns=["in.level"], **options)
    (row,) = prepare_prompts(args)[0]["train"]
    assert (row["solution"], row["level"], row["trajectory"], row["in.level"]) == ("1", 3, "t", 3)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"answer": True}, ["column 'answer'", "row 1", "of type bool"]),
        ({"answer": {"a": 1}}, ["row 1", "a record of ['a']"]),
        ({"prompt": [{"role": "human", "content": "q"}]}, ["row 1", "the role 'human'", "'user'"]),
        ({"prompt": [{"role": "user", "content": 3}]}, ["row 1", "'content' of type int"]),
        ({"prompt": {"text": "q"}}, ["row 1", "of type dict"]),
        ({"reply": ["t"]}, ["column 'reply'", "row 1", "of type list, not text"]),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, parts):
    rows = [{"prompt": "q", "answer": "1", "reply": "t"}, {"prompt": "p", "answer": "2", "reply": "t"} | row]
    args = PromptArguments(write(tmp_path / "rows.jsonl", rows), trajectory_column="reply")
    with pytest.raises(DataError) as error:
        prepare_prompts(args)
    assert all(part in str(error.value) for part in [*parts, "rows.jsonl"]), error.value


def test_no_row_left_is_told_in_one_line(tmp_path):
    rows = [{"prompt": " ", "answer": "1"}, {"prompt": "p", "answer": None}]
    with pytest.raises(DataError, match=r"is left of 2; dropped were: no problem text \(1\), no answer \(1\)$"):
        prepare_prompts(PromptArguments(write(tmp_path / "rows.jsonl", rows)))


def test_answers_that_cannot_be_graded_are_always_counted(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"problem": "a", "answer": "4"}, {"problem": "b", "answer": "???"}])
    test = write(tmp_path / "test.jsonl", [{"problem": "c", "answer": "5"}])
    argv = ["custom", "--dataset_name", source, "--eval_set", test, "--output_dir", str(tmp_path / "out")]
    assert script.run(argv) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- answers of `train` that cannot be graded, which `accuracy_reward` skips: 1 of 2, as '???'" in card
    assert "- answers of `test` that cannot be graded, which `accuracy_reward` skips: 0 of 1" in card
    assert "1 of 2" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["", "null", '{"problem": "a", "answer": "1"}\n{"prob', "1\n"])
def test_files_that_cannot_be_read_end_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        script.run(["custom", "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: Dataset" in last and "rows.jsonl cannot be read" in last


def test_an_output_that_cannot_be_written_is_named_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SystemExit):
        run(tmp_path, "--output_dir", str(tmp_path / "file" / "out"))
    assert f"cannot be made inside {tmp_path / 'file'}; choose another" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "to_parquet", fill)
    with pytest.raises(SystemExit):
        run(tmp_path, "--output_dir", str(tmp_path / "new" / "out"))
    assert "No space left on device; make room there" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


def test_a_chat_template_that_refuses_the_messages_is_named(tmp_path, tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"problem": "a", "answer": "1"}]
    with pytest.raises(DataError, match="refuses a prompt: no system role; change the messages"):
        prepare(tmp_path, rows, "custom", tokenizer=str(tmp_path / "tokenizer"), max_prompt_tokens=8)


def test_short_floats_and_levels_from_a_table_are_the_numbers_that_they_stand_for(tmp_path):
    features = Features({"problem": Value("string"), "answer": Value("float32"), "level": Value("float64")})
    rows = {"problem": ["a"], "answer": [7.1], "level": [3.0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    args = PromptArguments(str(tmp_path / "rows.parquet"), level_column="level", levels=[3])
    (row,) = prepare_prompts(args)[0]["train"]
    assert (row["solution"], row["level"]) == ("7.1", 3)


def test_an_empty_output_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert run(tmp_path, "--output_dir", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "README.md").exists()
