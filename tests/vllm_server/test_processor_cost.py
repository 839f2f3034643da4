"""The benchmark of the processor runs from end to end; what it measures is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.vllm
@pytest.mark.slow
def test_processor_cost(tmp_path):
    root = Path(__file__).parents[2]
    shape = "--rows 4 --tokens 4 --prompt 4 --hidden 128 --layers 1 --vocab 64 --repeats 1 --seeds".split()
    command = [
        sys.executable,
        str(root / "benchmarks" / "processor_cost.py"),
        *shape,
        "--json",
        str(tmp_path / "r.json"),
    ]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads(found.read_text())["results"]
    assert len(results) == 5 and results[0]["cpu_ratio"] == 1.0 and all(row["cpu_seconds"] > 0.0 for row in results)
