import json

import pytest
from datasets import Dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """Writes text, bytes or rows to a file of this name, and returns its path."""

    def write(name: str, content: str | bytes | list[dict]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and path.suffix in (".csv", ".parquet"):
            rows = Dataset.from_list(content)
            rows.to_csv(path, index=False) if path.suffix == ".csv" else rows.to_parquet(path)
            return str(path)
        if isinstance(content, list):
            lines = [json.dumps(row) for row in content]
            content = f"[{', '.join(lines)}]" if path.suffix == ".json" else "".join(line + "\n" for line in lines)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
