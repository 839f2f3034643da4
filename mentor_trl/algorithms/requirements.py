"""What several algorithms refuse, with the way out."""

import warnings

from accelerate.utils import parse_flag_from_env

from ..config import MentorGRPOConfig
from ..errors import SetupError


IMAGES = {"image", "images"}
# What TRL passes to reward functions beside the columns
REWARD_ARGUMENTS = {"prompts", "completions"}


def check_dataset(dataset, name: str, text_only: str | None = None) -> None:
    """
    Check that a dataset has rows and prompts.

    Raises:
        [`SetupError`]: naming the columns there are.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]", text_only)
        return
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise SetupError(f"`{name}` is empty. Check the split and the filters that made it.")
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise SetupError(
            f"`{name}` has no column `prompt`; it has {', '.join(columns)}. Rename the column that holds the prompts: "
            "`dataset.rename_column(..., 'prompt')`."
        )
    taken = sorted(REWARD_ARGUMENTS & set(columns))
    if taken:
        raise SetupError(
            f"`{name}` has the column `{taken[0]}`, a name under which reward functions are given something else. "
            f"Rename it: `dataset.rename_column('{taken[0]}', ...)`."
        )
    images = sorted(IMAGES & set(columns))
    if text_only is not None and images:
        raise SetupError(
            f"`{name}` has the column `{images[0]}`, and {text_only} are text only. Remove the column, or train with "
            "plain GRPO."
        )


def refuse_components(components: dict[str, object], what: str, plain: str) -> None:
    """
    Refuse arguments of the trainer that bring tokens of their own into a completion.

    Raises:
        [`SetupError`]: naming the argument.
    """
    for name, value in components.items():
        if value:
            raise SetupError(f"`{name}` is not supported with {what}. Remove it, {plain}.")


def check_dynamic_sampling(dataset, components: dict[str, object]) -> None:
    """
    Check that other prompts can be drawn from a training set, and that rows are made of them alone.

    Raises:
        [`SetupError`]: naming the argument.
    """
    plain = "or set `dynamic_sampling=0`"
    refuse_components(components, "dynamic sampling", plain)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise SetupError(
            f"`dynamic_sampling` draws prompts from anywhere in `train_dataset`, a {type(dataset).__name__}, which "
            f"has no rows by number. Load it whole, {plain}."
        )
    images = sorted(IMAGES & set(getattr(dataset, "column_names", None) or ()))
    if images:
        raise SetupError(
            f"`train_dataset` has the column `{images[0]}`, and rows that are sampled again are text only. Remove the "
            f"column, {plain}."
        )


def refuse_multimodal(multimodal: bool, option: str, off: object = 0) -> None:
    """
    Raises:
        [`SetupError`]: if prompts are processed as text and images; `option` is the field that asks for guided rows,
            `off` what asks for none.
    """
    if multimodal:
        raise SetupError(
            f"The processing class is multimodal, and the rollouts of `{option}` are text only. Pass the tokenizer as "
            f"`processing_class`, or set `{option}={off!r}`."
        )


def uses_fsdp(args: MentorGRPOConfig) -> bool:
    """Whether the policy is sharded by FSDP."""
    # `args.distributed_state` does not know of it; `accelerate launch` tells the Accelerator by this variable
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def refuse_shards(args: MentorGRPOConfig, what: str, advice: str) -> None:
    """
    Refuse a policy whose weights are in shards, for what reads its LM head outside of a forward pass.

    Raises:
        [`SetupError`]: naming the sharding.
    """
    plugin = args.deepspeed_plugin
    kind = "FSDP" if uses_fsdp(args) else "ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else None
    if kind is not None:
        raise SetupError(f"{kind} is not supported with {what}, which needs the whole of the LM head. {advice}")


def warn_of_kl(beta: float, source: str) -> None:
    """Warn that TRL's estimator of the KL divergence assumes samples of the policy."""
    if beta != 0.0:
        warnings.warn(
            f"`beta={beta}`: the KL estimator assumes samples of the policy, so it is biased on {source} rollouts. "
            f"Compare `mentor/on_policy/kl` with `mentor/{source}/kl`.",
            stacklevel=4,
        )
