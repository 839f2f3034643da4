"""Engines of tiny models, one for each set of options, shared by the tests."""

import importlib.util
import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents and item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


# The engine lives in the test's process; its models and caches are tiny
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of saved models, by what they are called."""
    from vllm_helpers import Folders

    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engines(folders):
    """`engines(policy, expert, **options)`: a sampler, made at its first use."""
    from vllm_helpers import Engines

    return Engines(folders)
