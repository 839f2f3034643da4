"""
Make training data: `mentor-trl data COMMAND ...`.

```bash
mentor-trl data math --output_dir data/math
mentor-trl data trajectories --dataset_name data/math --expert open-r1/OpenR1-Qwen-7B --output_dir data/math-expert
mentor-trl data hints --dataset_name data/math-expert --output_dir data/math-questa
```
"""

import argparse
import dataclasses
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mentor_trl.cli.parser import MentorArgumentParser, help_sections
from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from datasets import DatasetDict

    from mentor_trl.data.preparation.account import Report
    from mentor_trl.data.preparation.settings import OutputArguments


@dataclass(frozen=True)
class DataCommand:
    """
    A subcommand of `mentor-trl data`.

    Args:
        title (`str`):
            Title of the dataset card.
        help (`str`):
            One line for `mentor-trl data --help`.
    """

    title: str
    help: str


COMMANDS: dict[str, DataCommand] = {
    "math": DataCommand("MATH prompts", "MATH of levels 3 to 5 without the problems of the test sets"),
    "openr1": DataCommand("OpenR1-Math prompts", "OpenR1-Math-220k with correct responses of up to 4K tokens"),
    "gsm8k": DataCommand("GSM8K prompts", "GSM8K"),
    "custom": DataCommand("Prompts", "any file, folder or Hub dataset, by the names of its columns"),
    "trajectories": DataCommand("Expert trajectories", "add an expert's responses to a prompt dataset"),
    "hints": DataCommand("Prompts with hints", "put the first part of the trajectories into the prompts (QuestA)"),
}


class DataArgumentParser(MentorArgumentParser):
    """The parser of a command that is not launched by accelerate."""

    def _known_launch_options(self) -> dict[str, argparse.Action | None]:
        return {}

    def parse(self, args: list[str]) -> tuple:
        """Parse the command line and its config file; an unknown option is an error that names the nearest one."""
        self.split_launch_args(args)
        return self.parse_args_and_config(args)


def make_parser(name: str) -> DataArgumentParser:
    """Build the parser of a subcommand."""
    from mentor_trl.data.preparation.settings import (
        PRESETS,
        HintArguments,
        OutputArguments,
        PromptArguments,
        TrajectoryArguments,
    )

    arguments = {"trajectories": TrajectoryArguments, "hints": HintArguments}.get(name, PromptArguments)
    groups = {"data": (arguments, None), "output": (OutputArguments, None)}
    parser = DataArgumentParser(
        (arguments, OutputArguments),
        sections=help_sections(groups),
        prog=f"mentor-trl data {name}",
        description=f"{COMMANDS[name].title}: {COMMANDS[name].help}. Flags override a config file.",
    )
    parser.set_defaults(**PRESETS.get(name, {}))
    return parser


def _prepare(name: str, args: Any, output: "OutputArguments") -> "tuple[DatasetDict, Report, Any]":
    from mentor_trl.data.preparation import prepare_hints, prepare_prompts, prepare_trajectories

    if name == "trajectories":
        return prepare_trajectories(args, output)
    return *(prepare_hints(args) if name == "hints" else prepare_prompts(args)), None


def _notes(args: Any) -> list[str]:
    """Every option that has a value, for the card."""
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return [f"`{name}`: `{value}`" for name, value in options.items() if value not in (None, False, [])]


def main(name: str, args: Any, output: "OutputArguments", command: str) -> None:
    """Make a dataset, write it, and say what became of its rows."""
    from mentor_trl.data.preparation.output import check_output, make_card, write_dataset
    from mentor_trl.data.preparation.sources import count_unverifiable

    check_output(output)
    dataset, report, store = _prepare(name, args, output)
    report.facts += count_unverifiable(dataset)
    card = make_card(COMMANDS[name].title, command, report, dataset, _notes(args), output.output_format)
    report.print(f"{COMMANDS[name].title} ({getattr(args, 'dataset_name', None)})")
    for place in write_dataset(dataset, card, output):
        print(place)
    if store is not None:
        store.remove()


def _make_overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mentor-trl data",
        description="Make training data for MENTOR and its baselines.",
        epilog="`mentor-trl data COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def run(args: list[str] | None = None) -> int:
    """Parse the command line and make the data; a mistake of the user ends in one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if args is None else args)
    overview = _make_overview()
    name = overview.parse_known_args(args[:1])[0].command
    if name is None:
        overview.print_help()
        return 0
    parser = make_parser(name)
    try:
        parsed = parser.parse(args[1:])
        main(name, *parsed, command=shlex.join(["mentor-trl", "data", *args]))
    except SetupError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
