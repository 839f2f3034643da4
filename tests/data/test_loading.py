"""Files, folders and Hub ids: loaded as they are, or named in one line with the fix."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from mentor_trl.data import DataError, load_dataset_dict, select_split


ROWS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5", "level": 1},
    {"question": "What is 1000 + 24?", "answer": "It is 1,024.\n#### 1,024", "level": 2},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_give_one_train_split(write, suffix):
    dataset = load_dataset_dict(write(f"rows{suffix}", ROWS))
    assert list(dataset) == ["train"]
    assert dataset["train"].to_list() == ROWS


def test_the_config_of_a_hub_dataset_does_not_disturb_a_local_file_or_folder(write, tmp_path):
    path = write("rows/train.jsonl", ROWS)
    assert load_dataset_dict(path, config="main")["train"].num_rows == 2
    assert load_dataset_dict(str(tmp_path / "rows"), config="main")["train"].num_rows == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_folder_of_files_gives_the_splits_of_their_names(write, tmp_path, suffix):
    write(f"rows/train{suffix}", ROWS)
    write(f"rows/test{suffix}", [{**ROWS[0], "extra": "another column than in the other split"}])
    write("rows/LICENSE", "text")
    write("rows/.cache/rows.parquet", "no part of the dataset")
    assert load_dataset_dict(str(tmp_path / "rows")).num_rows == {"train": 2, "test": 1}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("with_splits", [True, False])
def test_folder_of_save_to_disk(tmp_path, with_splits, streaming):
    dataset = Dataset.from_list(ROWS)
    (DatasetDict({"train": dataset}) if with_splits else dataset).save_to_disk(tmp_path / "saved")
    assert list(load_dataset_dict(str(tmp_path / "saved"), streaming=streaming)["train"]) == ROWS


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(write, suffix, pack, streaming):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path = write(f"rows.jsonl{suffix}", pack(lines.encode()))
    assert list(load_dataset_dict(path, streaming=streaming)["train"]) == ROWS
    path = write(f"rows.tsv{suffix}", pack(b"a\tb\nx,y\tNone\n"))
    assert list(load_dataset_dict(path, streaming=streaming)["train"]) == [{"a": "x,y", "b": "None"}]


def test_folder_of_compressed_files(write, tmp_path):
    write("rows/train.csv.gz", gzip.compress(b"a,b\nx,N/A\n"))
    assert load_dataset_dict(str(tmp_path / "rows"))["train"].to_list() == [{"a": "x", "b": "N/A"}]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["None", "N/A", "7"], ["None", "N/A", "7"]),
        (["NaN", "nan", "null"], ["NaN", "nan", "null"]),
        (["True", "inf"], ["True", "inf"]),
        (["007", "7"], ["007", "7"]),
        (["1.50", "2"], ["1.50", "2"]),
        (["12345678901234567890123", "7"], ["12345678901234567890123", "7"]),
        (["7", "8"], [7, 8]),
        (["0.5", "1.25"], [0.5, 1.25]),
        (["7", ""], [7, None]),
        (["a", ""], ["a", None]),
    ],
)
def test_cells_of_a_csv_are_what_is_written_there(write, cells, expected):
    path = write("rows.csv", "a,b\n" + "".join(f"x,{cell}\n" for cell in cells))
    assert load_dataset_dict(path)["train"]["b"] == expected


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"a": "x", "b": 7}\n',
        b'{"a": "x", "b": 7}\r\n',
        b'{"a": "x", "b": 7}',
        b'\n{"a": "x", "b": 7}\n\n',
        b'[{"a": "x", "b": 7}]',
    ],
)
def test_marks_and_ends_of_lines_are_no_content(write, content):
    assert load_dataset_dict(write("rows.jsonl", content))["train"].to_list() == [{"a": "x", "b": 7}]


@pytest.mark.parametrize("streaming", [True, False])
def test_csv_files_of_a_repository_with_a_card(write, tmp_path, streaming):
    write("rows/README.md", "A card.")
    write("rows/train.csv", "a,b\nx,None\ny,N/A\nz,\n")
    dataset = load_dataset_dict(str(tmp_path / "rows"), streaming=streaming)
    assert [row["b"] for row in dataset["train"]] == ["None", "N/A", None]


def test_json_and_jsonl_are_one_type(write, tmp_path):
    write("rows/train.jsonl", ROWS)
    write("rows/test.json", ROWS[:1])
    assert load_dataset_dict(str(tmp_path / "rows")).num_rows == {"train": 2, "test": 1}


def test_a_csv_with_byte_order_mark_and_a_column_without_name(write):
    path = write("rows.csv", b"\xef\xbb\xbf,a\r\n0,x\r\n")
    assert load_dataset_dict(path)["train"].to_list() == [{"Unnamed: 0": 0, "a": "x"}]


def test_unknown_split_lists_the_splits():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS)})
    with pytest.raises(DataError, match="no split 'test', only 'train', 'validation'; set `dataset_test_split`"):
        select_split(splits, "test", "dataset_test_split")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("rows.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("rows.jsonl", '{"a": 1}\n{"a": "half', "line 2 is not valid JSON"),
        ("rows.jsonl", '{"a": 1}\n2\n', "line 2 is not a JSON object"),
        ("rows.jsonl", "", "the file is empty"),
        ("rows.jsonl", "null\n", "begins with b'null', and not with a JSON object"),
        ("rows.jsonl", '{"a": 1, "a": 2}\n', "twice"),
        ("rows.jsonl", '{"a": ' + "[" * 2000 + "]" * 2000 + "}\n", "recursion"),
        ("rows.jsonl.gz", b"not gzip", "BadGzipFile"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": "half', mtime=0), "line 2 is not valid JSON"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "ended before"),
        ("rows.json", "{", "cannot be read"),
        ("rows.json", "[]", "it has no rows"),
        ("rows.json", '[{"a": 12345678901234567890123}]', "an integer of more than 64 bits, which must be text"),
        ("rows.parquet", "not parquet", "cannot be read"),
        ("rows.parquet", "", "cannot be read"),
        ("rows.csv", "", "it has no rows"),
        ("rows.csv", "a,b\n", "it has no rows"),
        ("rows.csv", "a,b,b\n1,2,3\n", "has the column 'b' twice; rename or remove"),
        ("rows.csv", "a,b\n1,2,3\n4,5,6\n", "Expected 2 fields in line 2, saw 3"),
        ("rows.csv", "a;b\n1;2\n", "its separator seems to be ';'; separate the columns by commas"),
        ("rows.csv", "a\tb\n1\t2\n", "or by tabs in a .tsv file"),
        ("rows.csv", "a,b\né,2\n".encode("latin-1"), "it is not text in UTF-8"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "it is not text in UTF-8"),
        ("rows.txt", "a", "files of type '.txt' cannot be read; use .json, .jsonl, .parquet, .csv, .tsv"),
        ("rows.xlsx", b"PK", "files of type '.xlsx' cannot be read"),
        ("rows", '{"a": 1}', "files of type '' cannot be read"),
    ],
)
def test_unreadable_files_are_named(write, tmp_path, name, content, part):
    path = str(tmp_path / name) if content is None else write(name, content)
    with pytest.raises(DataError) as error:
        load_dataset_dict(path)
    assert part in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_parquet_with_a_column_twice_or_without_rows(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    for table, part in [(twice, "the column 'a' twice"), (twice.select([0]).slice(0, 0), "it has no rows")]:
        pq.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=part):
            load_dataset_dict(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ([], "is empty; put data files"),
        (["notes.txt"], "holds no data file, only notes.txt; put data files"),
        (["train.jsonl", "test.csv"], r"files of several types \(.*\); keep one type, or name a file"),
    ],
)
def test_folders_without_data_or_with_files_of_several_types(write, tmp_path, files, part):
    (tmp_path / "rows").mkdir()
    for name in files:
        write(f"rows/{name}", ROWS)
    with pytest.raises(DataError, match=part):
        load_dataset_dict(str(tmp_path / "rows"))


def test_files_of_one_split_with_other_columns(write, tmp_path):
    write("rows/a.jsonl", [{"a": 1}])
    write("rows/b.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(DataError, match="give its json files the same columns"):
        load_dataset_dict(str(tmp_path / "rows"))


def test_a_folder_that_is_not_there_is_told_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "maths").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"^There is no file or folder data/math \(working directory: .*maths\?\), and"
    ):
        load_dataset_dict("data/math")


def test_unreachable_hub_dataset_says_what_to_check(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"openai/gsm8k cannot be read: ConnectionError: no route; check the Hub id"):
        load_dataset_dict("openai/gsm8k")
