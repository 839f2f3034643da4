"""What is refused at construction, with the mend."""

import warnings

from accelerate.utils import parse_flag_from_env

from ..config import MentorGRPOConfig
from ..errors import SetupError
from ..experts.load import is_adapter


_PLAIN = "or set `num_mixed_generations=0` for plain GRPO"


def check_supported(args: MentorGRPOConfig, tools, rollout_func, environment_factory) -> None:
    """
    Raise a `ValueError` for what mixed rollouts do not support.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.
        tools, rollout_func, environment_factory:
            Arguments of the trainer.
    """
    given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
    for name, value in given.items():
        if value:
            raise SetupError(f"`{name}` is not supported with mixed rollouts. Remove it, {_PLAIN}.")
    if args.use_vllm:
        return
    # `args.distributed_state` does not know of FSDP; `accelerate launch` tells the Accelerator by this variable
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise SetupError(
            "FSDP is not supported with mixed rollouts in process: processes make different numbers of forward "
            "passes, which deadlocks its collectives. Set `use_vllm=True`, use DDP or DeepSpeed "
            f"(`accelerate_config: zero3`), {_PLAIN}."
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not args.ds3_gather_for_generation:
        raise SetupError(
            "ZeRO-3 with `ds3_gather_for_generation=False` is not supported with mixed rollouts in process: "
            "processes make different numbers of forward passes, which deadlocks. Set it to True, set "
            f"`use_vllm=True`, {_PLAIN}."
        )


def check_expert_given(args: MentorGRPOConfig, expert) -> None:
    """Raise a `ValueError` unless there is exactly one expert. A vLLM server brings its own."""
    served = args.use_vllm and args.vllm_mode == "server"
    if expert is None and args.expert_model_name_or_path is None and not served:
        raise SetupError(f"No expert: set `expert_model_name_or_path`, pass `expert=` to the trainer, {_PLAIN}.")
    if expert is not None and args.expert_model_name_or_path is not None:
        raise SetupError(
            "The expert is given twice, as `expert=` and as "
            f"`expert_model_name_or_path={args.expert_model_name_or_path!r}`. Keep one."
        )


def check_engine(args: MentorGRPOConfig, expert, model, quantization_config) -> None:
    """
    Raise a `ValueError` for what mixed rollouts with vLLM do not support.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration, with `use_vllm`.
        expert, model, quantization_config:
            Arguments of the trainer.
    """
    if expert is not None and not isinstance(expert, str):
        raise SetupError(
            f"The expert is a {type(expert).__name__}, and vLLM loads models by name. Pass the expert's id or folder "
            "(`save_pretrained` it first), or set `use_vllm=False`."
        )
    unused = {
        "expert_model_init_kwargs": None,
        "expert_model_revision": None,
        "expert_dtype": "auto",
        "expert_load_in_4bit": False,
        "expert_load_in_8bit": False,
    }
    for name, default in unused.items():
        if getattr(args, name) != default:
            raise SetupError(
                f"`{name}={getattr(args, name)!r}` applies to an expert that this process loads, and with `use_vllm` "
                f"vLLM does. Unset it; `mentor-trl serve` takes vLLM's own options, such as --dtype."
            )
    if quantization_config is not None or getattr(model, "is_quantized", False):
        raise SetupError(
            "A quantized policy cannot be handed to the vLLM engine of mixed rollouts. Train in bfloat16 with LoRA, "
            f"set `use_vllm=False`, {_PLAIN}."
        )
    if args.vllm_structured_outputs_regex is not None:
        raise SetupError(f"`vllm_structured_outputs_regex` is not supported with mixed rollouts. Unset it, {_PLAIN}.")
    needed = args.vllm_read_timeout + args.vllm_server_timeout
    if args.vllm_mode == "server" and args.world_size > 1 and args.ddp_timeout <= needed:
        warnings.warn(
            f"`ddp_timeout={args.ddp_timeout}` seconds are not above `vllm_read_timeout` and `vllm_server_timeout` "
            f"together ({needed:.0f}): if the server fails, the processes that wait may end before the main one has "
            "recovered, or saved a checkpoint. Raise `ddp_timeout`.",
            stacklevel=4,
        )
    if args.vllm_policy_server_base_url is not None and args.vllm_mode != "server":
        raise SetupError(
            f"`vllm_policy_server_base_url={args.vllm_policy_server_base_url!r}` needs `vllm_mode='server'`. Set "
            "that, or unset the address."
        )
    if args.vllm_mode == "colocate":
        if args.vllm_tensor_parallel_size > 1:
            raise SetupError(
                f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` is not supported with mixed rollouts "
                "in colocate mode. Set it to 1, or start `mentor-trl serve --tensor-parallel-size` and set "
                "`vllm_mode='server'`."
            )
        if is_adapter(expert, None):
            raise SetupError(
                f"The expert {expert!r} is a PEFT adapter, which vLLM cannot load as a model of its own. Merge it "
                "(`merge_and_unload`), save it, and name that folder."
            )


def check_trajectories(args: MentorGRPOConfig, train_dataset, tools, rollout_func, environment_factory) -> None:
    """
    Raise a `ValueError` for what trajectories in the place of rollouts do not support.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration, with `num_trajectory_generations`.
        train_dataset, tools, rollout_func, environment_factory:
            Arguments of the trainer.
    """
    plain = "or set `num_trajectory_generations=0` for plain GRPO"
    given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
    for name, value in given.items():
        if value:
            raise SetupError(f"`{name}` is not supported with expert trajectories. Remove it, {plain}.")
    columns = getattr(train_dataset, "column_names", None)
    if not isinstance(columns, list):
        return
    if args.trajectory_column not in columns:
        raise SetupError(
            f"`train_dataset` has no column `{args.trajectory_column}` with expert trajectories; it has "
            f"{', '.join(columns)}. Set `trajectory_column`, make the column with `mentor-trl data trajectories`, "
            f"{plain}."
        )
    images = {"image", "images"} & set(columns)
    if images:
        raise SetupError(
            f"`train_dataset` has the column `{images.pop()}`, and trajectories are text only. Remove the column, "
            f"{plain}."
        )


def check_dataset(dataset, name: str, guided: bool) -> None:
    """
    Check that a dataset has rows and prompts.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset.
        name (`str`):
            What the errors call it.
        guided (`bool`):
            Whether rollouts are mixed, which takes text only.

    Raises:
        `ValueError`: naming the columns there are.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]", guided)
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
    images = {"image", "images"} & set(columns)
    if guided and images:
        raise SetupError(
            f"`{name}` has the column `{images.pop()}`, and mixed rollouts are text only. Remove the column, {_PLAIN}."
        )
