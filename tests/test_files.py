import pytest

from mentor_trl.files import write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "results.json"
    write_whole(file, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "half of this \ud800 cannot be written")
    assert file.read_text() == "first"
    write_whole(file, "second \u00e9")
    assert file.read_text(encoding="utf-8") == "second \u00e9"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
