"""Training with an engine in the training process, one for each process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import make_tiny_model, make_tiny_tokenizer
from server_process import free_port
from trainer_helpers import same_weights


pytestmark = [pytest.mark.vllm, pytest.mark.shared_engine, pytest.mark.slow]


@pytest.fixture(scope="module", params=[1, 2], ids=["one_process", "two_processes"])
def ranks(request, tmp_path_factory) -> list[dict]:
    """Reports of one launch of colocate_run.py."""
    folder, count = tmp_path_factory.mktemp("colocate"), request.param
    for name, seed in (("policy", 0), ("expert", 1)):
        make_tiny_model(seed=seed, hidden_size=128).save_pretrained(folder / name)
        make_tiny_tokenizer().save_pretrained(folder / name)
    root = Path(__file__).parents[2]
    launcher = []
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("colocate_run.py")), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(count)]


def test_engine_and_training_model_agree_on_every_token(ranks):
    """
    The policy's weights arrived, of every step, and each process got the rows of its own prompts. vLLM computes in
    bfloat16 here; log-probabilities of other weights, or behind other prompts, are off by 1 and more.
    """
    for rank in ranks:
        for off in rank["off"]:
            found = off[~off.isnan()]
            assert found.numel() and found.abs().max() < 0.4 and found.abs().mean() < 0.1
        assert rank["version"].endswith("-5")  # of three steps, the evaluation and one more


def test_the_expert_speaks_until_guidance_is_over_and_stays_as_it_was(ranks):
    for rank in ranks:
        assert [mixed.sum().item() for mixed in rank["mixed"]] == [4, 4, 0]
        assert rank["branch"][0] > 0 and rank["branch"][1] > 0
        assert rank["before"] == rank["after"] and rank["evaluated"]


def test_processes_end_with_the_same_weights(ranks):
    assert all(same_weights(rank["weights"], ranks[0]["weights"]) for rank in ranks)
