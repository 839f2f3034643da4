"""The statistics of `rollout/test_exactness.py` on the vLLM engine in process."""

import pytest

from test_exactness import *  # noqa: F403
from test_exactness import SENTENCE_IDS
from vllm_helpers import make_model


pytestmark = [pytest.mark.vllm, pytest.mark.shared_engine]


@pytest.fixture(scope="module")
def policy():
    return make_model(seed=12)


@pytest.fixture(scope="module")
def expert():
    return make_model(seed=13)


@pytest.fixture(params=[1, 2, 4, 8], ids=lambda length: f"draft-{length}")
def sample(request, engines):
    def run(policy, expert, rows):
        return engines(policy, expert, draft_length=request.param, sentence_ids=SENTENCE_IDS).sample(rows)

    return run
