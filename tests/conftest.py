import os


# Before any Hugging Face library is imported: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from helpers import make_tiny_model, make_tiny_tokenizer


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
