import pytest

from helpers import make_tiny_tokenizer
from trainer_helpers import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved policy and expert."""
    paths = []
    for name, seed in (("policy", 0), ("expert", 1)):
        paths.append(str(tmp_path_factory.mktemp(name)))
        tiny(seed).save_pretrained(paths[-1])
        make_tiny_tokenizer().save_pretrained(paths[-1])
    return paths
