"""
The command line: `mentor-trl COMMAND ...`.

A command is an entry of `COMMANDS`. It gets the arguments that follow its name and returns an exit code; what it needs
is imported inside it, so that `mentor-trl --help` answers at once.
"""

import argparse
import difflib
import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from importlib import metadata, resources
from typing import Any

from ..errors import SetupError
from ..version import __version__


# Exit code of a mistake of the user
USAGE = 2


def train(args: list[str]) -> int:
    """Start the training script through `accelerate launch`, as `trl grpo` does."""
    from mentor_trl.cli.train import make_parser

    parser = make_parser(light=True)
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
        _all_cores(args)
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


def _all_cores(args: argparse.Namespace) -> None:
    """Without an accelerator accelerate leaves a process one thread, if nothing says how many."""
    import torch

    told = args.num_cpu_threads_per_process is not None or "OMP_NUM_THREADS" in os.environ
    if not told and not torch.accelerator.is_available():
        args.num_cpu_threads_per_process = max(1, torch.get_num_threads() // (args.num_processes or 1))


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

    parser = make_parser()
    launch_args, script_args = parser.split_launch_args(args)
    return launch_script("eval.py", launch_args, script_args) if launch_args else run(script_args)


# The line of help of each command, and its function from arguments to an exit code, by module
COMMANDS = {
    "init": ("write a recipe for your models, data and machine, and check that they fit", "init", "run"),
    "train": ("train a model with mixed-policy GRPO (MENTOR)", "main", "train"),
    "data": ("make prompt datasets without test problems, expert trajectories and hints", "data", "run"),
    "eval": ("evaluate a model on the sets of the MENTOR paper", "main", "evaluate"),
    "serve": ("serve mixed rollouts of a policy and its expert with vLLM", "serve", "serve"),
    "health": ("say whether a server is a MENTOR server, of which models and versions", "serve", "health"),
    "plot": ("draw training, guidance, reasoning words, pass@k, results, and rollouts token by token", "plot", "main"),
    "completion": ("print a script with which a shell completes commands and options", "completion", "run"),
    "env": ("print versions and devices, to paste into an issue", "env", "run"),
}


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        versions = [f"{name} {metadata.version(name)}" for name in ("trl", "transformers", "torch")]
        print(f"mentor-trl {__version__} ({', '.join(versions)})")
        parser.exit()


def command_parser(prog: str, description: str, commands: dict[str, str]) -> argparse.ArgumentParser:
    """The parser of a command's name, by name and help; each command parses its own options."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"`{prog} COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, text in commands.items():
        subparsers.add_parser(name, help=text, add_help=False)
    return parser


def choose_command(parser: argparse.ArgumentParser, argv: list[str], commands: Collection[str]) -> str | None:
    """The command that comes first; options before it are the parser's, and without one it prints its help."""
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(commands)}"
        parser.error(f"unknown command {argv[0]!r}: {hint}")
    name = parser.parse_known_args(argv[:1])[0].command
    if name is None:
        parser.print_help()
    return name


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    description = "Selective expert guidance for RL of language models, on top of TRL."
    parser = command_parser("mentor-trl", description, {name: text for name, (text, *_) in COMMANDS.items()})
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of this package and its base")
    name = choose_command(parser, argv, COMMANDS)
    if name is None:
        return 0
    _, module, function = COMMANDS[name]
    return getattr(importlib.import_module(f"mentor_trl.cli.{module}"), function)(argv[1:])
