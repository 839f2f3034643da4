"""
Train a model with MENTOR; what `mentor-trl train` launches.

```bash
mentor-trl train --config recipes/SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml
accelerate launch mentor_trl/cli/train.py --config recipes/SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml
```
"""

import difflib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, ModelConfig

    from mentor_trl.cli.arguments import MentorScriptArguments
    from mentor_trl.cli.parser import MentorArgumentParser
    from mentor_trl.config import MentorGRPOConfig
    from mentor_trl.trainer import MentorGRPOTrainer


logger = logging.getLogger(__name__)

CLASSES = ("MentorScriptArguments", "MentorGRPOConfig", "ModelConfig", "DatasetMixtureConfig")
# Reward functions that read the column `solution` of every row.
NEED_SOLUTION = {"accuracy_reward", "reasoning_accuracy_reward"}
# Modules of which one proves that a tracker is installed; the package is called as the tracker.
TRACKERS = {
    "trackio": ["trackio"],
    "wandb": ["wandb"],
    "swanlab": ["swanlab"],
    "tensorboard": ["tensorboard", "tensorboardX"],
}


class UsageError(SetupError):
    """An option of the command line or the config file cannot be used; the message says what to change."""


def make_parser(light: bool = False) -> "MentorArgumentParser":
    """Build the parser of the script; a `light` one reads the options from sources, for the help and the launch."""
    from mentor_trl.cli.fields import light_class
    from mentor_trl.cli.parser import MentorArgumentParser

    if light:
        script, training, model, mixture = map(light_class, CLASSES)
    else:
        from trl import DatasetMixtureConfig as mixture
        from trl import ModelConfig as model

        from mentor_trl.cli.arguments import MentorScriptArguments as script
        from mentor_trl.config import MentorGRPOConfig as training

    sections = {
        "expert and mixed rollouts": training,
        "data and rewards": script,
        "dataset": script.__bases__[0],
        "dataset mixture": mixture,
        "model": model,
    }
    return MentorArgumentParser(
        (script, training, model, mixture),
        sections=sections,
        prog="mentor-trl train",
        description="Train a model with mixed-policy GRPO. A config file sets any field below; flags override it.",
        epilog="Options of `accelerate launch` (--num_processes, --mixed_precision, ...) are accepted too, and "
        "--accelerate_config takes the path of a config file or a name of TRL's (single_gpu, multi_gpu, zero1, "
        "zero2, zero3, fsdp1, fsdp2).",
    )


def resolve_reward_funcs(names: list[str]) -> list[Callable]:
    """Return the reward functions of these names."""
    from trl.rewards import get_soft_overlong_punishment, reasoning_accuracy_reward, think_format_reward

    from mentor_trl.rewards.accuracy import accuracy_reward, format_reward

    known = {
        "accuracy_reward": accuracy_reward,
        "format_reward": format_reward,
        "reasoning_accuracy_reward": reasoning_accuracy_reward,
        "think_format_reward": think_format_reward,
        "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
    }
    return [known[name] if name in known else _import_reward_func(name, list(known)) for name in names]


def _import_reward_func(path: str, known: list[str]) -> Callable:
    module_path, _, name = path.rpartition(".")
    if not module_path:
        near = difflib.get_close_matches(path, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(
            f"Unknown reward function '{path}' in `reward_funcs`, known are {known}, or a dotted path{hint}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The module of reward function '{path}' cannot be imported: {error}; check the dotted path, install the "
            f"package, or run from the folder that holds it (now: {os.getcwd()})"
        ) from error
    if not callable(getattr(module, name, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"Module {module_path} has no function '{name}', only {functions}")
    return getattr(module, name)


def check_model_given(model_args: "ModelConfig") -> None:
    if not model_args.model_name_or_path:
        raise UsageError("No model is given; set `model_name_or_path` to a Hub id or a folder")


def check_options(script_args: "MentorScriptArguments", training_args: "MentorGRPOConfig") -> None:
    """Refuse what would fail only after the model is loaded."""
    num_rewards = len(script_args.reward_funcs or []) + bool(script_args.reward_model_name_or_path)
    if num_rewards == 0:
        raise UsageError("No reward is given; set `reward_funcs`, for example to [accuracy_reward, format_reward]")
    weights = training_args.reward_weights
    if weights is not None and len(weights) != num_rewards:
        raise UsageError(
            f"`reward_weights` holds {len(weights)} numbers for {num_rewards} rewards; give one for each, the reward "
            "model first"
        )
    colocated = training_args.use_vllm and training_args.vllm_mode == "colocate"
    if colocated and importlib.util.find_spec("vllm") is None:
        shared = training_args.num_mixed_generations > 0 and training_args.expert_base_url is None
        raise UsageError(
            "`use_vllm` with `vllm_mode` colocate needs vLLM, which is not installed; run `pip install 'mentor-trl["
            f"{'vllm-shared' if shared else 'vllm'}]'`, or set `use_vllm` to false or `vllm_mode` to server"
        )
    for tracker in training_args.report_to:
        if tracker in TRACKERS and not any(map(importlib.util.find_spec, TRACKERS[tracker])):
            raise UsageError(
                f"`report_to` names {tracker}, which is not installed; run `pip install {tracker}`, or set "
                "`report_to` to none"
            )


def resolve_checkpoint(value: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to resume from; `True` or `"true"` is the newest whole one in `output_dir`."""
    from mentor_trl.training.resume import usable_checkpoint

    if value is None or str(value).lower() in ("false", "none", ""):
        return None
    found = usable_checkpoint(str(value).lower() == "true" or str(value), output_dir)
    if found is True:
        raise UsageError(
            f"`resume_from_checkpoint` is true, but {output_dir} holds no checkpoint-N folder; set it to false for "
            "the first run, or check `output_dir` and `save_strategy`"
        )
    return found


def check_output_dir(folder: str) -> None:
    """Refuse an output folder that cannot be written, before anything is loaded."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"`output_dir` is {folder}, which cannot be written: {error.strerror}; choose another folder, or make "
            "this one writable"
        ) from error


def _has_chat_template(training_args: "MentorGRPOConfig", model_args: "ModelConfig") -> bool:
    from transformers import AutoProcessor

    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"{_unloadable(model_args)}: {error}") from error
    return bool(getattr(processor, "chat_template", None))


def _unloadable(model_args: "ModelConfig") -> str:
    name = model_args.model_name_or_path
    absent = f"; there is no folder {name}, and the Hub or its cache gives no such model"
    return f"The model cannot be loaded (`model_name_or_path` is {name!r}{'' if Path(name).exists() else absent})"


def main(
    script_args: "MentorScriptArguments",
    training_args: "MentorGRPOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
    recipe: dict[str, Any] | None = None,
) -> None:
    """
    Load the data, build the trainer, train and save. The arguments are the parsed options, by group, and all that were
    set (`recipe`), which are saved as `recipe.yaml`.
    """
    check_model_given(model_args)
    check_options(script_args, training_args)
    check_output_dir(training_args.output_dir)
    if training_args.disable_tqdm or not sys.stderr.isatty():
        _hide_bars()
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    data = _load_data(script_args, training_args, model_args, dataset_args)
    # Only now the slow imports and the model: everything above fails within seconds.
    from mentor_trl.publishing.hub import make_repository

    if training_args.push_to_hub and training_args.process_index == 0:
        make_repository(training_args)
    trainer = _make_trainer(training_args, model_args, *data)
    trainer.recipe = recipe
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.print("Training completed.")
    _publish(trainer, script_args.dataset_name)
    trainer.accelerator.end_training()


def dry_run(
    script_args: "MentorScriptArguments",
    training_args: "MentorGRPOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
    given: dict[str, Any],
    parse_again: Callable[[list[str]], tuple],
) -> None:
    """
    Check what was parsed, and make one step on a tiny batch. `parse_again` parses the same command line with further
    options, and `given` holds all that were set.
    """
    check_model_given(model_args)
    check_options(script_args, training_args)
    resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    rewards, dataset, _ = _load_data(script_args, training_args, model_args, dataset_args)

    from rich.console import Console

    from mentor_trl.planning import trial
    from mentor_trl.planning.checks import print_checks, refuse

    checks = trial.check_run(training_args, model_args, dataset, script_args.reward_funcs or [])
    if training_args.process_index == 0:
        print_checks(checks, "Dry run", Console())
    refuse(checks)
    # Where a server that sees `output_dir` sees it, too
    served = training_args.use_vllm and training_args.vllm_mode == "server"
    place = trial.existing(training_args.output_dir) if served else None
    with tempfile.TemporaryDirectory(prefix="mentor-trl-dry-run-", dir=place) as folder:
        _, small, model_args, _ = parse_again(trial.trial_flags(training_args, given, folder))
        trainer = _make_trainer(small, model_args, rewards, trial.few(dataset, small), None)
        done = trial.try_batch(trainer)
        if training_args.process_index == 0:
            Console().print(f"\n{done} Nothing was written to {training_args.output_dir}.", highlight=False)
        trainer.accelerator.end_training()


def _load_data(script_args, training_args, model_args, dataset_args) -> tuple[list, "Dataset", "Dataset | None"]:
    """Reward functions, and the rows to train and to evaluate on."""
    from mentor_trl.data import load_prompt_datasets

    names = script_args.reward_funcs or []
    reward_funcs = resolve_reward_funcs(names)
    if script_args.reward_model_name_or_path:
        reward_funcs.insert(0, script_args.reward_model_name_or_path)
    train_dataset, eval_dataset = load_prompt_datasets(
        script_args,
        dataset_args,
        has_chat_template=_has_chat_template(training_args, model_args),
        require_solution=bool(NEED_SOLUTION & set(names)),
        with_eval=training_args.eval_strategy != "no",
    )
    if "accuracy_reward" in names and training_args.process_index == 0:
        _warn_of_ungradable(train_dataset)
    return reward_funcs, train_dataset, eval_dataset


def _hide_bars() -> None:
    """Those of the libraries, of data and weights that are read and written: in a log file they are noise."""
    from datasets.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()


def _warn_of_ungradable(dataset: "Dataset | IterableDataset") -> None:
    from mentor_trl.rewards import ungradable_warning

    # A streamed dataset cannot be read ahead.
    warning = ungradable_warning(dataset["solution"]) if hasattr(dataset, "__len__") else None
    if warning:
        logger.warning(warning)


def _publish(trainer: "MentorGRPOTrainer", dataset_name: str | None) -> None:
    """Save the model with its card and, where asked to, push both in one commit (`save_model` would push a first)."""
    from mentor_trl.publishing.hub import HUB_ERRORS, is_hub_id, one_line, withheld
    from mentor_trl.training.rollout_log import FOLDER

    args, print_once = trainer.args, trainer.accelerator.print
    # The Hub refuses a card that names a file as its dataset
    dataset_name = dataset_name if dataset_name and is_hub_id(dataset_name) else None
    if not args.push_to_hub:
        if args.save_strategy == "no":  # else the trainer has saved it
            trainer.save_model(args.output_dir)
        trainer.create_model_card(model_name=Path(args.output_dir).absolute().name, dataset_name=dataset_name)
        print_once(f"Model saved to {args.output_dir}.")
        if Path(args.output_dir, FOLDER).is_dir():
            print_once(f"Look at a rollout: mentor-trl plot rollout {args.output_dir}")
        return
    try:
        trainer.push_to_hub(dataset_name=dataset_name)
    except HUB_ERRORS as error:
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in ["checkpoint-*", *withheld(args, args.output_dir)])
        raise UsageError(
            f"The model is trained and saved in {args.output_dir}, but could not be pushed to {trainer.hub_model_id}: "
            f"{one_line(error)}; push it later with: hf upload {trainer.hub_model_id} {args.output_dir} . {excluded}"
        ) from error
    print_once(f"Model saved to {args.output_dir} and pushed to https://huggingface.co/{trainer.hub_model_id}.")


def _make_trainer(training_args, model_args, reward_funcs, train_dataset, eval_dataset):
    from trl import get_peft_config, get_quantization_config

    from mentor_trl.trainer import MentorGRPOTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        return MentorGRPOTrainer(
            model_args.model_name_or_path,
            reward_funcs,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except SetupError:
        raise
    except (OSError, ValueError, TypeError, ImportError) as error:
        # What transformers raises for a model that is not there has no number
        if isinstance(error, OSError) and error.errno is None:
            raise UsageError(f"{_unloadable(model_args)}: {error}") from error
        raise UsageError(f"The trainer cannot be built with these options: {error}") from error


def run(args: list[str] | None = None) -> int:
    """Parse the command line and train, or try to."""
    # TRL's own use of names that transformers 5.24 has replaced
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
    parser, args = make_parser(), sys.argv[1:] if args is None else args

    def start(*parsed: Any) -> None:
        given = parser.given_options(args)
        if not parsed[0].dry_run:
            return main(*parsed, recipe=given)
        again = lambda flags: make_parser().parse_args_and_config([*args, *flags])
        dry_run(*parsed, given=given, parse_again=again)

    return parser.run(args, start)


if __name__ == "__main__":
    raise SystemExit(run())
