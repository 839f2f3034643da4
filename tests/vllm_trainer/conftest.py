import pytest

from helpers import make_tiny_tokenizer
from server_process import serving_expert, serving_models
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


@pytest.fixture(scope="session")
def servers(folders, tmp_path_factory):
    """Two replicas of the policy, of which adapters may be loaded, and the expert."""
    root, lora = tmp_path_factory.mktemp("servers"), ("--enable-lora", "--max-lora-rank", "8")
    with (
        serving_models(folders[0], None, root / "first.txt", *lora, ready=False) as first,
        serving_models(folders[0], None, root / "second.txt", *lora, ready=False) as second,
        serving_expert(folders[1], root / "expert.txt", ready=False) as expert,
    ):
        for server in (first, second, expert):
            server.wait_until_ready()
        yield first, second, expert
