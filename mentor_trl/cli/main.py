"""
The command line: `mentor-trl COMMAND ...`.

A command is an entry of `COMMANDS`. It gets the arguments that follow its name and returns an exit code; what it needs
is imported inside it, so that `mentor-trl --help` answers at once.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from ..errors import SetupError


# Exit code of a mistake of the user
USAGE = 2


@dataclass(frozen=True)
class Command:
    """
    A subcommand.

    Args:
        help (`str`):
            One line for `mentor-trl --help`.
        run (`Callable[[list[str]], int]`):
            Function from the arguments after the name to an exit code.
    """

    help: str
    run: Callable[[list[str]], int]


def train(args: list[str]) -> int:
    """Start the training script through `accelerate launch`, as `trl grpo` does."""
    from mentor_trl.cli.train import make_parser

    parser = make_parser(prog="mentor-trl train", light=True)
    if "-h" in args or "--help" in args:
        parser.print_help()
        return 0
    if not args:
        parser.error(
            "nothing is set: give --config FILE.yaml (recipes/ holds some), or at least --model_name_or_path, "
            "--expert_model_name_or_path, --dataset_name and --reward_funcs"
        )
    launch_args, script_args = parser.split_launch_args(args)

    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        launch_args = resolve_accelerate_config_argument(launch_args)
    except ValueError as error:
        parser.error(str(error))
    # One option says it to accelerate, the other to the Trainer
    if "--cpu" in launch_args:
        script_args = [*script_args, "--use_cpu", "true"]
    elif parser.given_options(args).get("use_cpu") and "--num_processes" in " ".join(launch_args):
        launch_args = [*launch_args, "--cpu"]
    return launch_script("train.py", launch_args, script_args)


def launch_script(name: str, launch_args: list[str], script_args: list[str]) -> int:
    """
    Run a script of `mentor_trl.cli` with `accelerate launch`, on several processes also where there are only CPUs. A
    request to end (SIGTERM) goes to the processes that were launched.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    script = str(resources.files("mentor_trl.cli").joinpath(name))
    args = launch_command_parser().parse_args([*launch_args, script, *script_args])
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # of options that were not given
    before = signal.signal(signal.SIGTERM, _end_children)
    try:
        _several_on_the_cpu(args)
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode >= 0 else 128 - error.returncode
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode == USAGE:  # the others may have been ended for it
            return USAGE
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"mentor-trl: error: {name} cannot be launched: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _several_on_the_cpu(args: argparse.Namespace) -> None:
    """Without an accelerator accelerate starts one process, whatever `num_processes` says."""
    import torch

    if (args.num_processes or 1) == 1 or args.mpirun_hostfile is not None:
        return
    if args.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args.cpu, args.multi_gpu = False, True
    elif not args.tpu and args.config_file is None and not torch.accelerator.is_available():
        raise SetupError(
            f"`num_processes` is {args.num_processes}, but this machine has no accelerator; add --cpu for processes "
            "on the CPU"
        )


def _end_children(signum: int, frame: Any) -> None:
    """accelerate waits for the process that it has started, which would go on without it."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(signum)
    if not children:
        sys.exit(128 + signum)


def evaluate(args: list[str]) -> int:
    """Evaluate in this process, or through `accelerate launch` where options of it are given."""
    from mentor_trl.cli.eval import make_parser, run

    parser = make_parser(prog="mentor-trl eval")
    if "-h" in args or "--help" in args:
        parser.print_help()
        return 0
    launch_args, script_args = parser.split_launch_args(args)
    return launch_script("eval.py", launch_args, script_args) if launch_args else run(script_args)


def serve(args: list[str]) -> int:
    """Serve mixed rollouts with vLLM."""
    from mentor_trl.cli.serve import serve

    return serve(args)


def health(args: list[str]) -> int:
    """Say what a server is."""
    from mentor_trl.cli.serve import health

    return health(args)


def data(args: list[str]) -> int:
    """Make training data."""
    from mentor_trl.cli.data import run

    return run(args)


def plot(args: list[str]) -> int:
    """Draw what training and evaluation left on disk."""
    from mentor_trl.cli.plot import main

    return main(args)


COMMANDS: dict[str, Command] = {
    "train": Command("train a model with mixed-policy GRPO (MENTOR)", train),
    "data": Command("make prompt datasets without test problems, expert trajectories and hints", data),
    "eval": Command("evaluate a model on the sets of the MENTOR paper", evaluate),
    "serve": Command("serve mixed rollouts of a policy and its expert with vLLM", serve),
    "health": Command("say whether a server is a MENTOR server, of which models and versions", health),
    "plot": Command("draw training, guidance, reasoning words, pass@k, results, and rollouts token by token", plot),
}


def _version() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("trl", "transformers", "torch")]
    return f"mentor-trl {metadata.version('mentor-trl')} ({', '.join(versions)})"


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(_version())
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's name; each command parses its own options."""
    parser = argparse.ArgumentParser(
        prog="mentor-trl",
        description="Selective expert guidance for RL of language models, on top of TRL.",
        epilog="`mentor-trl COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of this package and its base")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    # Options before the command are ours, all after it are the command's.
    args, _ = parser.parse_known_args(argv[:1])
    if args.command is None:
        parser.print_help()
        return 0
    return COMMANDS[args.command].run(argv[1:])
