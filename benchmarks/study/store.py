"""Finished runs: JSON lines, one file a study, which a run is added to when it has ended."""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any


RESULTS = Path("docs/results/study")


def key_of(description: dict[str, Any]) -> str:
    """What tells a run from others: a digest of everything that it depends on."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def add(file: Path, line: dict[str, Any]) -> None:
    """Add a finished run. Several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        torn = file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")  # by a kill
        stream.write("\n" * torn + json.dumps(line) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Finished runs; a last line that was cut off by a kill is left out."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def by_key(folder: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of all studies by their key."""
    return {line["key"]: line for file in sorted(folder.glob("*.jsonl")) for line in read(file)}


def done(file: Path) -> set[tuple[str, str]]:
    """Arms and keys of the finished runs of a study."""
    return {(line["arm"], line["key"]) for line in read(file)}
