"""What the options of a run do not allow together."""

from typing import Any


LOADING_OPTIONS = (
    "expert_model_init_kwargs",
    "expert_model_revision",
    "expert_dtype",
    "expert_load_in_4bit",
    "expert_load_in_8bit",
)
"""Fields that say how this process loads an expert."""


def check_trajectories(args: Any) -> None:
    n, count, mixed = args.num_generations, args.num_trajectory_generations, args.num_mixed_generations
    if count < 0:
        raise ValueError(f"`num_trajectory_generations` is {count}; set it to 0 (none) or more.")
    if not count:
        return
    if mixed:
        raise ValueError(
            f"`num_trajectory_generations={count}` and `num_mixed_generations={mixed}`: a group holds expert "
            "trajectories (LUFFY) or mixed rollouts (MENTOR), not both. Set one of them to 0."
        )
    if n - count < 2:
        raise ValueError(
            f"`num_trajectory_generations={count}` leaves {n - count} of `num_generations={n}` rollouts "
            f"on-policy, and at least 2 are needed. Set `num_trajectory_generations` to {max(n - 2, 0)} or less, "
            f"or raise `num_generations` to {count + 2} or more."
        )
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"`importance_sampling_level={args.importance_sampling_level!r}` gives all tokens of a rollout one "
            "ratio, and the policy shaping of trajectories is per token. Set it to 'token'."
        )
    if args.remove_unused_columns:
        raise ValueError(
            f"`remove_unused_columns=True` removes the column `{args.trajectory_column}` from the training set. "
            "Set it to False."
        )


def check_dynamic_sampling(args: Any) -> None:
    """Groups that are sampled at different times are put together, so each must be complete in itself."""
    if args.dynamic_sampling < 0:
        raise ValueError(f"`dynamic_sampling` is {args.dynamic_sampling}; set it to 0 (none) or more.")
    if not args.dynamic_sampling:
        return
    for name, value in (("scale_rewards", "batch"), ("multi_objective_aggregation", "normalize_then_sum")):
        if getattr(args, name) == value:
            raise ValueError(
                f"`{name}={value!r}` makes advantages of a whole batch, and `dynamic_sampling` replaces groups of "
                f"it. Set `{name}` to {args.__dataclass_fields__[name].default!r}, or `dynamic_sampling` to 0."
            )
    if args.distillation == "opd" and not args.distillation_reward:
        raise ValueError(
            "`dynamic_sampling` looks for groups whose rewards differ, and `distillation='opd'` without "
            "`distillation_reward` learns nothing from rewards. Set `dynamic_sampling` to 0, or "
            "`distillation_reward=True`."
        )
    check_whole_groups(args, "`dynamic_sampling`")


def fill_guided_prompts(args: Any) -> None:
    """Choose what is not set: mixed rollouts for failing prompts, where these can be told in time."""
    if args.guide_prompts is None:
        on_policy = 0 < args.num_mixed_generations < args.num_generations
        possible = on_policy and args.entropy_threshold_from != "previous" and not _odd_rows(args)
        args.guide_prompts = "failing" if possible else "all"
    if args.entropy_threshold_from is None:
        args.entropy_threshold_from = "current" if args.guide_prompts == "failing" else "previous"


def check_guided_prompts(args: Any) -> None:
    if args.guide_prompts == "all":
        return
    if args.entropy_threshold_from == "previous":
        raise ValueError(
            f"`guide_prompts={args.guide_prompts!r}` samples on-policy rollouts before mixed ones, and "
            "`entropy_threshold_from='previous'` samples all at once. Set it to 'current'."
        )
    check_whole_groups(args, f"`guide_prompts={args.guide_prompts!r}`")


def check_whole_groups(args: Any, what: str) -> None:
    if _odd_rows(args):
        rows = args.per_device_train_batch_size * args.steps_per_generation
        raise ValueError(
            f"{what} needs whole groups on each process, which has {rows} rows of a rollout batch "
            f"(`per_device_train_batch_size` times `steps_per_generation`), no multiple of "
            f"`num_generations={args.num_generations}`. Set one of them so that it is."
        )


def _odd_rows(args: Any) -> int:
    """Rows of a process that are no whole group."""
    return args.per_device_train_batch_size * args.steps_per_generation % args.num_generations


def check_policy_sampling(args: Any, what: str, plain: str) -> None:
    """Refuse what makes the policy's distribution another than that of its log-probabilities."""
    neutral = {"top_p": (1.0,), "top_k": (0, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    for name, values in neutral.items():
        if getattr(args, name) not in values:
            raise ValueError(
                f"`{name}={getattr(args, name)}` changes the sampling distribution of the policy, and {what} exact "
                f"only without it. Set `{name}` to {values[0]}, or {plain}."
            )
    if args.temperature <= 0.0:
        raise ValueError(f"`temperature` is {args.temperature}; rollouts need a positive temperature.")


def check_sampling(args: Any) -> None:
    """Mixed rollouts are exact for temperature sampling only; everything else is refused, not approximated."""
    check_policy_sampling(args, "mixed rollouts are", "`num_mixed_generations` to 0")
    if args.generation_kwargs:
        raise ValueError(
            f"`generation_kwargs={args.generation_kwargs}` does not apply to mixed rollouts. Remove it (the "
            "temperature has its own field), or set `num_mixed_generations` to 0."
        )
    if args.cache_implementation is not None:
        raise ValueError(
            f"`cache_implementation={args.cache_implementation!r}` does not apply to mixed rollouts, which have "
            "their own cache. Unset it, or set `num_mixed_generations` to 0."
        )
    if args.multi_objective_aggregation == "normalize_then_sum":
        raise ValueError(
            "`multi_objective_aggregation='normalize_then_sum'` has no definition for mixed rollouts, whose "
            "baseline is the group's mean reward. Use 'sum_then_normalize', or set `num_mixed_generations` to 0."
        )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "`use_transformers_continuous_batching` is not supported with mixed rollouts. Set it to False: they "
            "have their own engine."
        )
    if args.max_completion_length is None:
        raise ValueError("`max_completion_length` is unset; mixed rollouts need a limit, e.g. 512.")


def check_expert_server(args: Any) -> None:
    """What an expert that is asked at branch points only does not allow."""
    if args.branch_share is not None and args.branch_rule not in ("random", "sentence"):
        raise ValueError(
            f"`branch_share={args.branch_share}` has no meaning for `branch_rule={args.branch_rule!r}`. Unset it, "
            "or choose 'random' or 'sentence'."
        )
    if args.expert_base_url is None:
        if args.vllm_weight_sync == "adapter":
            raise ValueError(
                "`vllm_weight_sync='adapter'` needs a policy that is served alone. Set `expert_base_url` to a "
                "server of the expert, or choose 'auto': the engine of policy and expert takes whole weights."
            )
        return
    check_one_expert(args)
    if args.correction_level == "mixture":
        raise ValueError(
            "`correction_level='mixture'` needs the expert's log-probability at every token, and an expert on a "
            "server (`expert_base_url`) is asked at branch points only. Set it to 'conditional', or name the "
            "expert in `expert_model_name_or_path`."
        )
    if args.vllm_policy_server_base_url is not None:
        raise ValueError(
            f"`vllm_policy_server_base_url={args.vllm_policy_server_base_url!r}` is a second server beside one of "
            "policy and expert. With `expert_base_url` name all servers of the policy in `vllm_server_base_url`, "
            "separated by commas."
        )


def check_one_expert(args: Any) -> None:
    """An expert on a server is not loaded by this process."""
    if args.expert_model_name_or_path is not None:
        raise ValueError(
            f"The expert is given twice, as `expert_base_url={args.expert_base_url!r}` and as "
            f"`expert_model_name_or_path={args.expert_model_name_or_path!r}`. Keep one."
        )
    for name in LOADING_OPTIONS:
        if getattr(args, name) != getattr(type(args), name):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` applies to an expert that this process loads, and that of "
                "`expert_base_url` is loaded by its server. Unset it, and pass vLLM's own options there."
            )


def check_distillation(args: Any) -> None:
    """What tokens whose advantages come from an expert's scores do not allow."""
    if args.distillation == "none":
        return
    plain = "set `distillation` to 'none'"
    check_policy_sampling(args, "the log-probabilities that distillation compares are", plain)
    if args.expert_base_url is not None:
        check_one_expert(args)
    if args.num_trajectory_generations:
        raise ValueError(
            f"`num_trajectory_generations={args.num_trajectory_generations}` and `distillation="
            f"{args.distillation!r}`: a trajectory's tokens are not the policy's. Set the former to 0, or {plain}."
        )
    if args.importance_sampling_level != "token" or args.loss_type in ("luspo", "vespo"):
        raise ValueError(
            f"`importance_sampling_level={args.importance_sampling_level!r}` and `loss_type={args.loss_type!r}`: "
            "distillation gives each token its own advantage. Set the former to 'token' and the latter to 'dapo' or "
            f"another that clips tokens, or {plain}."
        )
    if args.distillation_loss != "sampled" and args.distillation != "distilled_rl":
        loss = f"`distillation_loss={args.distillation_loss!r}`"
        if args.expert_base_url is not None:
            raise ValueError(
                f"{loss} needs the expert's distributions, and a server (`expert_base_url={args.expert_base_url!r}`) "
                "gives log-probabilities of tokens. Set it to 'sampled', or name the expert in "
                "`expert_model_name_or_path`."
            )
        if args.top_entropy_quantile < 1.0:
            raise ValueError(
                f"`top_entropy_quantile={args.top_entropy_quantile}` leaves tokens out of TRL's loss, beside which "
                f"{loss} has a term for every token. Set the former to 1.0, or the latter to 'sampled'."
            )
    if args.distillation in ("gats", "distilled_rl") and args.num_mixed_generations == args.num_generations:
        raise ValueError(
            f"`distillation={args.distillation!r}` looks at the rewards of on-policy rollouts, and "
            f"`num_mixed_generations={args.num_mixed_generations}` leaves none. Set it to "
            f"{max(args.num_generations - 2, 0)} or less, or `distillation` to 'opd'."
        )
    if args.distillation == "gats" and args.gats_reference is None and not args.num_mixed_generations:
        raise ValueError(
            "`distillation='gats'` compares the policy's score with the expert's, and no mixed rollout shows that. "
            "Set `gats_reference` to the expert's mean reward (e.g. as `mentor-trl eval` measures it), or "
            "`num_mixed_generations` above 0."
        )
