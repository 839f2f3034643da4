"""Engines of tiny models, one for each set of options, shared by the tests."""

import pytest


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
