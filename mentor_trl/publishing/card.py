"""The model card: TRL's, with the expert, the settings, the curves, the recipe and the results of evaluations."""

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from ..errors import SetupError
from . import recipe
from .hub import is_hub_id


if TYPE_CHECKING:
    from ..config import MentorGRPOConfig
    from ..trainer import MentorGRPOTrainer


# Our sections stand before this heading of TRL's card
HEADING = "### Framework versions"
_NO_BASE = "[None](https://huggingface.co/None)"
_CURVES = {
    "training": "Training dynamics of the on-policy rollouts",
    "guidance": "What the expert did",
}


def complete_card(
    trainer: "MentorGRPOTrainer",
    dataset_name: str | None = None,
    results: str | Path | dict[str, Any] | None = None,
) -> None:
    """
    Complete the `README.md` that TRL has just written, on the main process. That of a run without mixed rollouts
    stays TRL's, but for the results.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.
        dataset_name (`str`, *optional*):
            Dataset that the model was trained on. If not given, that of the recipe.
        results (`str` or `Path` or `dict`, *optional*):
            Results of `mentor-trl eval`, their file `results.json`, or its folder. They become a table and the card's
            `model-index`.

    Raises:
        [`SetupError`]: if there are no such results.
    """
    if not trainer.is_world_process_zero():
        return
    path = Path(trainer.args.output_dir, "README.md")
    guided = trainer.args.num_mixed_generations > 0
    if not guided and results is None:
        return
    card = ModelCard.load(path)
    if guided:
        text = card.text.replace(_NO_BASE, link(trainer.model.config._name_or_path))
        before, heading, after = text.partition(HEADING)
        sections = [expert_sentence(trainer), "### Settings", settings_table(trainer, dataset_name)]
        sections += curve_section(trainer) + recipe_section(trainer)
        card.text = "\n\n".join([before.rstrip("\n"), *sections, heading + after])
    if results is not None:
        add_results(card, results, path.resolve().parent.name)
    card.save(path)


def add_results(card: ModelCard, results: str | Path | dict[str, Any], model_name: str) -> None:
    """
    Put results of `mentor-trl eval` into a card.

    Args:
        card ([`~huggingface_hub.ModelCard`]):
            Card, which is changed.
        results (`str` or `Path` or `dict`):
            See [`complete_card`].
        model_name (`str`):
            Name of the model, where the card gives none.
    """
    from ..evaluation.model_index import update_card
    from ..evaluation.summary import model_index

    if not isinstance(results, dict):
        file = Path(results).expanduser()
        file = file / "results.json" if file.is_dir() else file
        if not file.is_file():
            raise SetupError(f"There are no results {file}; `mentor-trl eval --output_dir FOLDER` writes them.")
        results = json.loads(file.read_text(encoding="utf-8"))
    update_card(card, model_index(results), model_name)


def expert_sentence(trainer: "MentorGRPOTrainer") -> str:
    """Who the expert was, and what it did."""
    args = trainer.args
    return (
        f"The expert was {link(trainer.expert_name)}. It chose some of the tokens in {args.num_mixed_generations} of "
        f"the {trainer.num_generations} rollouts of each prompt (branch rule: {args.branch_rule}), and is not needed "
        "to use this model."
    )


def settings_table(trainer: "MentorGRPOTrainer", dataset_name: str | None = None) -> str:
    """
    The settings that matter, as a table in Markdown.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.
        dataset_name (`str`, *optional*):
            Dataset, if it is not that of the recipe.
    """
    args, count = trainer.args, trainer.num_generations
    weights = trainer.reward_weights.tolist()
    rewards = [f"`{name}` ({weight:g})" for name, weight in zip(trainer.reward_func_names, weights)]
    engine = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
    rows = {
        "dataset": _dataset(trainer, dataset_name),
        "rollouts a prompt": f"{count}, of which {args.num_mixed_generations} mixed",
        "prompts a rollout batch": f"{args.generation_batch_size // count}",
        "branch rule": f"`{args.branch_rule}`",
        "gamma (entropy threshold)": _gamma(args),
        "alpha (weight of mixed rollouts)": _alpha(args),
        "correction of expert tokens": _correction(args),
        "rewards (weights)": ", ".join(rewards),
        "range of the rewards": f"{args.reward_range:g}",
        "sampling": f"temperature {args.temperature:g}, up to {args.max_completion_length} tokens, {engine}",
        "loss": f"`{args.loss_type}`, clipped to [1 - {args.epsilon:g}, 1 + {_upper(args):g}], beta {args.beta:g}",
        "learning rate": f"{args.learning_rate:g}, {_text(args.lr_scheduler_type)}",
        "optimizer steps": f"{trainer.state.global_step}",
        "seed": f"{args.seed}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def _dataset(trainer: "MentorGRPOTrainer", name: str | None) -> str:
    options = trainer.recipe or {}
    name = name or options.get("dataset_name")
    if not isinstance(name, str):
        return ""
    if not is_hub_id(name):
        return f"`{Path(name).name}`, local"
    parts = [options.get("dataset_config"), options.get("dataset_train_split")]
    rest = ", ".join(f"`{part}`" for part in parts if part)
    return f"[{name}](https://huggingface.co/datasets/{name})" + (f", {rest}" if rest else "")


def _gamma(args: "MentorGRPOConfig") -> str:
    if args.branch_rule == "always":
        return ""
    if args.entropy_threshold is not None:
        return f"{args.entropy_threshold:g} nats, fixed"
    return (
        f"{args.entropy_quantile:g}-quantile of the entropies of on-policy tokens, at least "
        f"{args.entropy_threshold_min:g} nats"
    )


def _alpha(args: "MentorGRPOConfig") -> str:
    if args.alpha_schedule == "constant":
        return f"{args.alpha:g}, constant"
    return f"{args.alpha_schedule} from {args.alpha:g} to 0 over {args.expert_decay_steps} rollout batches"


def _correction(args: "MentorGRPOConfig") -> str:
    if args.correction == "temper" and args.correction_exponent == 0.0:
        return "none"
    cap, floor = f"cap {args.correction_cap:g}", f"floor {args.correction_floor:g}"
    details = {
        "temper": f"{cap}, exponent {args.correction_exponent:g}",
        "clip": f"{floor}, {cap}",
        "mask": cap,
        "saturate": f"constant {args.correction_constant:g}",
    }
    return f"`{args.correction}`, `{args.correction_level}`, {details[args.correction]}"


def _upper(args: "MentorGRPOConfig") -> float:
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def curve_section(trainer: "MentorGRPOTrainer") -> list[str]:
    """The section with the curves; empty without matplotlib, and before anything is logged."""
    drawn = draw_curves(trainer)
    pictures = [f"![{_CURVES[path.stem]}]({path.parent.name}/{path.name})" for path in drawn]
    return ["### Training curves", *pictures] if pictures else []


def draw_curves(trainer: "MentorGRPOTrainer") -> list[Path]:
    """
    Draw what was logged so far to `assets/training.png` and `assets/guidance.png` of the output folder.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.

    Returns:
        `list[Path]`: the pictures that could be drawn. One that could not gives a warning, never an error: the card
        is written while the model is saved.
    """
    try:
        import matplotlib  # noqa: F401
        import pandas  # noqa: F401
    except ImportError:
        return []
    from ..analysis.figures import plot_guidance, plot_training
    from ..analysis.runs import Run
    from ..analysis.style import save_figure

    folder = Path(trainer.args.output_dir)
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    if not history:
        return []
    runs = [Run(folder, folder.resolve().name, history)]
    first = "accuracy" if "accuracy_reward" in trainer.reward_func_names else "reward"
    smooth = 5 if len(history) >= 50 else 1
    plots = {
        "training": lambda: plot_training(runs, (first, "entropy", "length"), smooth=smooth),
        "guidance": lambda: plot_guidance(runs, smooth),
    }
    drawn = []
    for name, plot in plots.items():
        try:
            drawn.append(save_figure(plot()[0], folder / "assets" / f"{name}.png"))
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"The curves {name}.png of the model card could not be drawn: {error!r}", stacklevel=2)
    return drawn


def recipe_section(trainer: "MentorGRPOTrainer") -> list[str]:
    """The section with the options that the run was started with; empty where no command line did."""
    if trainer.recipe is None:
        return []
    return [
        "### Recipe",
        f"[`{recipe.FILE}`]({recipe.FILE}) repeats this run: `mentor-trl train --config {recipe.FILE}`.",
        f"<details><summary>{recipe.FILE}</summary>",
        f"```yaml\n{recipe.to_yaml(trainer.recipe)}```",
        "</details>",
    ]


def link(name: str | None) -> str:
    """A model as the card names it; of a local folder only the name, not where it lies."""
    if not name:
        return "a model that names no origin"
    if name.count("/") == 1 and not name.startswith(".") and not os.path.exists(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{Path(name).name}`, a local model"
