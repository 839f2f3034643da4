"""The model card: TRL's, with the expert, the settings, the curves, the recipe and the results of evaluations."""

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy

from ..analysis.figures import plot_guidance, plot_training
from ..analysis.runs import Run
from ..analysis.style import save_figure
from ..config import MentorGRPOConfig
from ..errors import SetupError
from .hub import is_hub_id
from .model_index import model_index, update_card
from .recipe import PUBLISHED, names_dataset


# Our sections stand before this heading of TRL's card
HEADING = "### Framework versions"
_NO_BASE = "[None](https://huggingface.co/None)"
_NO_MODEL, _CHAT = 'model="None"', '[{"role": "user", "content": question}]'
# Options that the card shows where they are set
MIXING = (
    *("branch_rule", "entropy_quantile", "entropy_threshold", "entropy_threshold_min"),
    *("alpha", "alpha_schedule", "expert_decay_steps"),
    *("correction", "correction_level", "correction_exponent", "correction_cap", "correction_floor"),
    *("correction_constant", "reward_range"),
)
DISTILLING = (
    *("distillation", "distillation_loss", "distillation_coef", "distillation_reward", "distillation_clip"),
    *("gats_reference", "gats_smoothing"),
)
SETTINGS = (
    *("num_generations", "num_mixed_generations", "generation_batch_size"),
    *MIXING,
    *DISTILLING,
    *("temperature", "max_completion_length", "use_vllm"),
    *("loss_type", "epsilon", "epsilon_high", "beta", "learning_rate", "lr_scheduler_type", "seed"),
)


def complete_card(
    args: MentorGRPOConfig,
    state: TrainerState,
    *,
    base: str | None,
    expert: str | None,
    rewards: Sequence[tuple[str, float]],
    recipe: dict[str, Any] | None = None,
    dataset_name: str | None = None,
    results: str | Path | dict[str, Any] | None = None,
    training: bool = False,
    chats: bool = True,
) -> None:
    """
    Complete the `README.md` that TRL has just written. That of a run without an expert stays TRL's, but for the
    results, and a quick start that runs, with the folder of a model that is not on the Hub and, unless it `chats`, a
    plain prompt.

    `recipe` holds the options that the run was started with, and the dataset, where `dataset_name` does not say it.
    `results` are those of `mentor-trl eval`, their file `results.json`, or its folder: they become a table and the
    card's `model-index`. While `training` goes on, the curves, which take seconds, are drawn only for a push.
    """
    path = Path(args.output_dir, "README.md")
    card = ModelCard.load(path)
    card.text = card.text.replace(_NO_MODEL, f'model="{_shown(path.parent)}"')
    if not chats:
        card.text = card.text.replace(_CHAT, "question")
    if args.num_mixed_generations > 0 or args.distillation != "none":
        before, heading, after = card.text.replace(_NO_BASE, link(base)).partition(HEADING)
        pushed = args.push_to_hub and args.hub_strategy != HubStrategy.END
        first = "accuracy" if "accuracy_reward" in dict(rewards) else "reward"
        sections = [
            f"The expert was {link(expert)}. It {_part_of(args)}, and is not needed to use this model.",
            "### Settings",
            settings_table(args, state.global_step, rewards, dataset_name or (recipe or {}).get("dataset_name")),
            *(curve_section(path.parent, state.log_history, first) if pushed or not training else []),
        ]
        if recipe is not None:
            does = "repeats this run" if names_dataset(recipe) else "repeats this run, once it names the dataset"
            text = f"`mentor-trl train --config {PUBLISHED}` {does}: [{PUBLISHED}]({PUBLISHED})."
            sections += ["### Recipe", text]
        card.text = "\n\n".join([before.rstrip("\n"), *sections, heading + after])
    if results is not None:
        update_card(card, model_index(_read_results(results)), path.resolve().parent.name)
    card.save(path)


def _shown(folder: Path) -> str:
    """A folder as it was given, but not where on a machine it lies."""
    return folder.name if folder.is_absolute() else folder.as_posix()


def _part_of(args: MentorGRPOConfig) -> str:
    """What the expert did."""
    parts = []
    if args.num_mixed_generations > 0:
        rows = f"{args.num_mixed_generations} of the {args.num_generations} rollouts of each prompt"
        parts.append(f"chose some of the tokens in {rows}")
    if args.distillation != "none":
        parts.append("scored the tokens that this model wrote")
    return " and ".join(parts)


def _read_results(results: str | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(results, dict):
        return results
    file = Path(results).expanduser()
    file = file / "results.json" if file.is_dir() else file
    if not file.is_file():
        raise SetupError(f"There are no results {file}; `mentor-trl eval --output_dir FOLDER` writes them.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SetupError(f"{file} is not valid JSON: {error}") from error


def settings_table(
    args: MentorGRPOConfig, steps: int, rewards: Sequence[tuple[str, float]], dataset_name: str | None = None
) -> str:
    """The settings that matter, by their names in a config file, as a table in Markdown."""
    unused = MIXING if args.num_mixed_generations == 0 else ()
    unused += DISTILLING if args.distillation == "none" else ()
    rows = {name: getattr(args, name) for name in SETTINGS if name not in unused}
    rows["rewards (weights)"] = ", ".join(f"{name} ({weight:g})" for name, weight in rewards)
    rows["optimizer steps"] = steps
    if isinstance(dataset_name, str):
        rows["dataset"] = dataset_name if is_hub_id(dataset_name) else f"{Path(dataset_name).name}, local"
    lines = [f"| {name} | `{getattr(value, 'value', value)}` |" for name, value in rows.items() if value is not None]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def curve_section(folder: Path, log_history: list[dict[str, Any]], first: str) -> list[str]:
    """
    Draw what was logged so far to `assets/training.png`, whose first panel is the metric `first`, and, where rollouts
    were mixed, `assets/guidance.png` of a folder. The paragraphs of the card are none without matplotlib, and before
    two steps are logged; a picture that cannot be drawn gives a warning, for the card is written while the model is
    saved.
    """
    history = [entry for entry in log_history if "reward" in entry]
    if len({entry.get("step") for entry in history}) < 2 or importlib.util.find_spec("matplotlib") is None:
        return []
    runs = [Run(folder, folder.resolve().name, history)]
    smooth = 5 if len(history) >= 50 else 1
    training = lambda: plot_training(runs, (first, "entropy", "length"), smooth=smooth)
    guidance = lambda: plot_guidance(runs, smooth)
    pictures = []
    plots = [("training", training, "Training dynamics of the on-policy rollouts")]
    if any("mentor/alpha" in entry for entry in history):
        plots.append(("guidance", guidance, "What the expert did"))
    for name, plot, title in plots:
        try:
            save_figure(plot()[0], folder / "assets" / f"{name}.png")
            pictures.append(f"![{title}](assets/{name}.png)")
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"The curves {name}.png of the model card could not be drawn: {error!r}", stacklevel=2)
    return ["### Training curves", *pictures] if pictures else []


def link(name: str | None) -> str:
    """A model as the card names it; of a local folder only the name, not where it lies."""
    if not name:
        return "a model that names no origin"
    if "/" in name and is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{Path(name).name}`, a local model"
