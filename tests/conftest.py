import gc
import importlib.util
import os
import tempfile


# Before any Hugging Face library is imported: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and wait for each other where cores are shared
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM: nothing is reported, and engines live in the test's process, with the caches that their options name
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, which would replace the option

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from helpers import make_tiny_model, make_tiny_tokenizer
from server_process import RUNNING


# trackio, which TRL imports, reads it once
TRACKS = tempfile.TemporaryDirectory()
os.environ["TRACKIO_DIR"] = TRACKS.name


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def pytest_collection_finish():
    """Training collects garbage at its start; what was imported is not looked through every time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what the servers said."""
    report = yield
    if report.failed:
        report.sections += [(f"End of the log of {server.url}", server.tail()) for server in RUNNING]
    return report


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Character-level tokenizer with a chat template."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama (seed 0) and its tokenizer, as `from_pretrained` takes it. Read only."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model(seed=0).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_expert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of another tiny Llama (seed 1) with the same tokens. Read only."""
    folder = tmp_path_factory.mktemp("tiny_expert")
    make_tiny_model(seed=1).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder
