"""Folders by which weights reach a server."""

import os
import sys

import torch

from mentor_trl.rollout.serving.weights import new_run_id, remove_dead_weights, write_weights
from server_process import serving


WRITER = """
import sys, time, torch
from mentor_trl.rollout.serving.weights import new_run_id, write_weights

run = new_run_id()
write_weights([("a", torch.ones(1))], sys.argv[1] + f"/{run}-1")

def slowly():
    yield "a", torch.ones(1)
    print(run, flush=True)
    time.sleep(999)

write_weights(slowly(), sys.argv[1] + f"/{run}-2")
"""


def test_weights_of_killed_runs_are_removed_by_the_next(tmp_path):
    with serving([sys.executable, "-c", WRITER, str(tmp_path)], tmp_path / "log.txt") as server:
        while not (run := server.log.read_text()).endswith("\n"):
            assert server.process.poll() is None
        first, second = (tmp_path / name for name in (f"{run.strip()}-1", f"{run.strip()}-2.partial"))
        mine, foreign = tmp_path / f"{new_run_id()}-1", tmp_path / "0a1b2c3d.0a1b2c3d.1.1-1"
        others = [mine, foreign, tmp_path / "checkpoint-1", tmp_path / "0a1b2c3d-1"]
        for folder in others:
            folder.mkdir()
        remove_dead_weights(tmp_path)
        assert first.exists() and second.exists()
        server.kill()
        remove_dead_weights(tmp_path)
        assert not first.exists() and not second.exists() and all(folder.exists() for folder in others)
        remove_dead_weights(tmp_path / "nowhere")


def test_nobody_else_can_write_where_weights_are(tmp_path):
    mask = os.umask(0)
    try:
        write_weights([("a", torch.ones(1))], tmp_path / "v1")
    finally:
        os.umask(mask)
    assert (tmp_path / "v1").stat().st_mode & 0o077 == 0
