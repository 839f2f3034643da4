r"""
Turns a stock vLLM engine with speculative decoding (target = expert, draft = policy) into one that samples exactly
from the mixed policy m = (1 - w) p + w s.

vLLM loads [`register`] through the entry point `vllm.general_plugins` in each of its processes. Nothing changes in an
engine whose `additional_config` has no entry `"mentor_trl"`; [`engine_options`] makes the options of one that has.
"""

from ..vllm_server.options import CONFIG_KEY, engine_environment
from .shared_options import engine_options


__all__ = ["CONFIG_KEY", "engine_environment", "engine_options", "register"]


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from .hooks import install

    install()
