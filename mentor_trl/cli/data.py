"""
Make training data: `mentor-trl data COMMAND ...`.

```bash
mentor-trl data math --output_dir data/math
mentor-trl data trajectories --dataset_name data/math --expert open-r1/OpenR1-Qwen-7B --output_dir data/math-expert
mentor-trl data hints --dataset_name data/math-expert --output_dir data/math-questa
```
"""

import shlex
from typing import TYPE_CHECKING, Any

from mentor_trl.cli.main import choose_command, command_parser
from mentor_trl.cli.parser import MentorArgumentParser


if TYPE_CHECKING:
    from mentor_trl.data.preparation.settings import OutputArguments


# Title of the card, and the line of the help
COMMANDS = {
    "math": ("MATH prompts", "MATH of levels 3 to 5 without the problems of the test sets"),
    "openr1": ("OpenR1-Math prompts", "OpenR1-Math-220k with correct responses of up to 4K tokens"),
    "gsm8k": ("GSM8K prompts", "GSM8K"),
    "custom": ("Prompts", "any file, folder or Hub dataset, by the names of its columns"),
    "trajectories": ("Expert trajectories", "add an expert's responses to a prompt dataset"),
    "hints": ("Prompts with hints", "put the first part of the trajectories into the prompts (QuestA)"),
}


def make_parser(name: str) -> MentorArgumentParser:
    """Build the parser of a subcommand."""
    from mentor_trl.data.preparation.settings import (
        PRESETS,
        HintArguments,
        OutputArguments,
        PromptArguments,
        TrajectoryArguments,
    )

    arguments = {"trajectories": TrajectoryArguments, "hints": HintArguments}.get(name, PromptArguments)
    parser = MentorArgumentParser(
        (arguments, OutputArguments),
        sections={"data": arguments, "output": OutputArguments},
        launched=False,
        prog=f"mentor-trl data {name}",
        description=f"{': '.join(COMMANDS[name])}. Flags override a config file.",
    )
    parser.set_defaults(**PRESETS.get(name, {}))
    return parser


def main(name: str, args: Any, output: "OutputArguments", command: str) -> None:
    """Make a dataset, write it, and say what became of its rows."""
    from mentor_trl.data.preparation import prepare_hints, prepare_prompts, prepare_trajectories
    from mentor_trl.data.preparation.output import check_output, make_card, write_dataset
    from mentor_trl.data.preparation.sources import count_unverifiable

    check_output(output)
    store, title = None, COMMANDS[name][0]
    if name == "trajectories":
        dataset, report, store = prepare_trajectories(args, output)
    else:
        dataset, report = prepare_hints(args) if name == "hints" else prepare_prompts(args)
    report.facts += count_unverifiable(dataset)
    report.print(f"{title} ({args.dataset_name})")
    for place in write_dataset(dataset, make_card(title, command, report, dataset, args, output), output):
        print(place)
    if store is not None:
        store.remove()


def run(args: list[str]) -> int:
    """Parse the command line and make the data."""
    description = "Make training data for MENTOR and its baselines."
    commands = {name: text for name, (_, text) in COMMANDS.items()}
    name = choose_command(command_parser("mentor-trl data", description, commands), args, commands)
    if name is None:
        return 0
    command = shlex.join(["mentor-trl", "data", *args])
    return make_parser(name).run(args[1:], lambda options, output: main(name, options, output, command))
