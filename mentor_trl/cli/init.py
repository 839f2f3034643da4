"""
Write a recipe for one's own models, data and machine: `mentor-trl init`.

```bash
mentor-trl init --policy Qwen/Qwen2.5-1.5B-Instruct --expert Qwen/Qwen2.5-7B-Instruct --dataset_name rows.jsonl
```
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mentor_trl.config_fields import option
from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from mentor_trl.cli.parser import MentorArgumentParser


@dataclass
class InitModelArguments:
    """Arguments of `mentor-trl init` about the models; each field's help says what it does."""

    policy: str | None = option(None, "Hub id or folder of the model to train.")
    expert: str | None = option(None, "Hub id or folder of the expert, a model with the policy's tokens.")
    expert_base_url: str | None = option(
        None, "Address of the expert's vLLM server, where it is not to be loaded beside the policy."
    )
    method: Literal["mentor", "grpo", "opd", "gats", "distilled_rl"] = option(
        "mentor",
        "What the expert does: speak in rollouts (`mentor`), nothing (`grpo`), score the policy's tokens (`opd`, "
        "`distilled_rl`), or both (`gats`).",
    )
    trust_remote_code: bool = option(False, "Whether to run code that a model's repository ships.")


@dataclass
class InitDataArguments:
    """Arguments of `mentor-trl init` about the data; each field's help says what it does."""

    dataset_name: str | None = option(None, "Hub id, data file (.jsonl, .parquet, .csv) or folder of the prompts.")
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_prompt_column: str | None = option(
        None, "Column of the prompt. If not set, `prompt`, `question`, `problem` or `instruction`."
    )
    dataset_solution_column: str | None = option(
        None, "Column of the solution. If not set, `solution`, `answer` or `ground_truth`."
    )
    system_prompt: str | None = option(
        "mentor", "System prompt; `mentor` asks for thoughts in <think> and an answer in \\boxed{}, `none` for none."
    )
    reward_funcs: list[str] | None = option(
        None,
        "Reward functions, by name or dotted import path. If not set, `accuracy_reward`, and `format_reward` with the "
        "system prompt `mentor`.",
    )
    max_completion_length: int | None = option(
        None, "Tokens of a completion. If not set, what fits: up to 1024 on a GPU and 128 on a CPU."
    )


@dataclass
class InitOutputArguments:
    """Arguments of `mentor-trl init` about machine and output; each field's help says what it does."""

    gpus: int | None = option(None, "Number of GPUs to plan for, 0 for the CPU. If not set, those of this machine.")
    gpu_memory: float | None = option(None, "Memory of a GPU in GB. If not set, that of this machine's.")
    output: str = option("mentor.yaml", "File to write.")
    output_dir: str | None = option(None, "Folder of the run. If not set, one in `outputs` with the policy's name.")
    force: bool = option(False, "Whether to replace the file.")


def make_parser() -> "MentorArgumentParser":
    """Build the parser of the command."""
    from mentor_trl.cli.parser import MentorArgumentParser

    classes = {"models": InitModelArguments, "data": InitDataArguments, "machine and output": InitOutputArguments}
    return MentorArgumentParser(
        tuple(classes.values()),
        sections=classes,
        launched=False,
        prog="mentor-trl init",
        description="Write a recipe for your models, data and machine, after checking that they fit together. No "
        "weights are loaded.",
        epilog="Then: `mentor-trl train --config mentor.yaml --dry_run`, and without --dry_run.",
    )


def check_arguments(models: InitModelArguments, data: InitDataArguments, output: InitOutputArguments) -> None:
    """Refuse what needs no look at anything."""
    if not models.policy:
        raise SetupError("No policy is given; set --policy to the Hub id or folder of the model to train")
    if not data.dataset_name:
        raise SetupError("No data are given; set --dataset_name to a Hub id, a file or a folder")
    served = models.expert or models.expert_base_url
    if models.method == "grpo" and served:
        raise SetupError("`--method grpo` has no expert; leave it out, or choose another method")
    if models.method != "grpo" and not served:
        raise SetupError(
            "No expert is given; set --expert to a model with the policy's tokens, or --expert_base_url to the "
            "address of its server, or train without one: --method grpo"
        )
    if Path(output.output).exists() and not output.force:
        raise SetupError(f"{output.output} exists; choose another --output, or replace it with --force")
    if data.max_completion_length is not None and data.max_completion_length < 1:
        raise SetupError(f"`max_completion_length` is {data.max_completion_length}; it must be 1 or more")


def main(models: InitModelArguments, data: InitDataArguments, output: InitOutputArguments) -> None:
    """Look at everything, print what was found, and write the recipe if it fits."""
    check_arguments(models, data, output)

    from rich.console import Console

    from mentor_trl.files import write_whole
    from mentor_trl.planning.checks import print_checks, refuse
    from mentor_trl.planning.hardware import find_hardware
    from mentor_trl.planning.survey import Wishes, survey

    hardware = find_hardware(output.gpus, output.gpu_memory)
    policy_name = Path(models.policy).name
    wishes = Wishes(**{**vars(models), **vars(data)}, output_dir=output.output_dir or f"outputs/{policy_name}")
    plan, checks = survey(wishes, hardware)
    print_checks(checks, f"{policy_name} on {Path(data.dataset_name).name}, for {hardware}", Console())
    refuse(checks, "; nothing was written")
    path = Path(output.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, plan.text(output.output))
    print(f"\nWrote {path}. Next:\n  mentor-trl train --config {path} --dry_run\n  mentor-trl train --config {path}")


def run(args: list[str]) -> int:
    """Parse the command line and write the recipe."""
    parser = make_parser()
    if not args:
        parser.error("nothing is set: give at least --policy, --expert and --dataset_name")
    return parser.run(args, main)
