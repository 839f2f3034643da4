"""Two workers that each hold half of both models, in processes of their own."""

import os
import sys
from pathlib import Path

import pytest

from server_process import serving


pytestmark = [pytest.mark.vllm, pytest.mark.shared_engine, pytest.mark.slow]

PROGRAM = """
import sys

from mentor_trl import ColocateSampler, MixedRequest
from statistics_helpers import Tree, labelled, misfit, sequences
from vllm_helpers import ENGINE_OPTIONS, check_records, make_model

if __name__ == "__main__":
    models = [make_model(seed=12), make_model(seed=13)]
    folders = [f"{sys.argv[1]}/{name}" for name in ("policy", "expert")]
    for model, folder in zip(models, folders):
        model.save_pretrained(folder)
    sampler = ColocateSampler(*folders, draft_length=4, tensor_parallel_size=2, **ENGINE_OPTIONS)
    request = MixedRequest([[3, 1, 2]] * 2000, [2.0] * 2000, 4, (0,), score_all=True)
    rollout = sampler.sample(request)
    check_records(*models, request, rollout)
    tree = Tree(*models, request)
    assert misfit([(labelled(rollout), tree.joint(tree.outcomes))]) <= 1.0
    assert misfit([(sequences(rollout), tree.policy())]) > 3.0
    assert misfit([(sequences(rollout), tree.expert())]) > 3.0
    print("exact\\n", end="", flush=True)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_exact_with_two_workers(tmp_path):
    (program := tmp_path / "program.py").write_text(PROGRAM)
    tests = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), str(tests / "vllm_plugin")]),
        # one core for each worker, where both share a NUMA node
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    command = [sys.executable, str(program), str(tmp_path)]
    with serving(command, tmp_path / "log.txt", environment=environment) as workers:
        assert workers.process.wait(timeout=300) == 0
        assert "exact" in workers.log.read_text().splitlines()
