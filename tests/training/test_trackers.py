"""Experiment trackers, each in a process of its own and without its servers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = """
import sys
from trainer_helpers import make_trainer

make_trainer(".", report_to=[sys.argv[1]], run_name="a-run", log_completions=True).train()
"""
# Where each keeps what it was told, and the file of a table of completions where it takes tables
KEPT = {
    "swanlab": ("swanlog/run-*/run-*.swanlab", None),
    "tensorboard": ("runs/*/events.out.tfevents.*", None),
    "trackio": ("trackio/*.db*", "trackio/*.db*"),
    "wandb": ("wandb/offline-run-*/run-*.wandb", "wandb/offline-run-*/files/media/table/completions*.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", KEPT)
def test_a_tracker_is_told_the_metrics(tracker, tmp_path):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed (pip install 'mentor-trl[trackers]')")
    offline = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tracker],
        cwd=tmp_path,
        env={**os.environ, **offline, "SWANLAB_PROJECT": "a-project", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    metrics, table = KEPT[tracker]
    kept = b"".join(file.read_bytes() for file in tmp_path.glob(metrics))
    for name in (b"mentor/gamma", b"mentor/on_policy/reward"):
        assert name in kept, f"{tracker} does not know {name}"
    if table is not None:
        assert b"on_policy" in b"".join(file.read_bytes() for file in tmp_path.glob(table))
