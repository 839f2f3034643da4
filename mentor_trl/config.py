"""Configuration of [`MentorGRPOTrainer`]."""

from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig

from .config_checks import (
    check_distillation,
    check_dynamic_sampling,
    check_expert_server,
    check_guided_prompts,
    check_sampling,
    check_trajectories,
    fill_guided_prompts,
)
from .config_fields import documented, given_fields, option
from .errors import SetupError
from .objective import (
    BRANCH_RULES,
    CORRECTIONS,
    DISTILLATION_LOSSES,
    DISTILLATIONS,
    MIXED_SCALES,
    SCHEDULES,
)


CORRECTION_LEVELS = ("conditional", "mixture")
THRESHOLD_SOURCES = ("previous", "current")
GUIDED_PROMPTS = ("all", "failing")
LOG_FORMATS = ("line", "full")
WEIGHT_SYNCS = ("auto", "nccl", "folder", "adapter")


@documented
@dataclass
class MentorGRPOConfig(GRPOConfig):
    """
    Configuration class for the [`MentorGRPOTrainer`].

    This class includes only the parameters that MENTOR ([paper](https://huggingface.co/papers/2510.04140)) and its
    baselines add to GRPO. Everything else is inherited, with TRL's defaults, from [`~trl.GRPOConfig`].
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["expert_model_init_kwargs"]

    # Parameters that control the expert
    expert_model_name_or_path: str | None = option(
        None,
        "Model id, local folder, or PEFT adapter folder of the expert. It must have the tokens of the policy.",
    )
    expert_model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] when the expert is loaded.",
    )
    expert_model_revision: str | None = option(None, "Revision of the expert and of its tokenizer.")
    expert_dtype: str = option(
        "auto",
        "Data type of the expert's weights: `'auto'` (that of its checkpoint), `'bfloat16'`, `'float16'` or "
        "`'float32'`.",
    )
    expert_load_in_4bit: bool = option(False, "Whether to load the expert in 4 bits (needs bitsandbytes).")
    expert_load_in_8bit: bool = option(False, "Whether to load the expert in 8 bits (needs bitsandbytes).")
    expert_base_url: str | None = option(
        None,
        "Address of a stock vLLM server of the expert (`vllm serve EXPERT --logprobs-mode processed_logprobs`), or "
        "several addresses of equal servers, separated by commas. The expert is then asked there, one token at a "
        "branch point; the policy is sampled in this process, or with `use_vllm` by vLLM.",
    )
    expert_served_model_name: str | None = option(
        None, "Name under which that server serves the expert. If not set, the first that it lists."
    )
    expert_api_key_file: str | None = option(
        None,
        "File with the key of that server. If not set, the key is in the environment variable "
        "`MENTOR_TRL_EXPERT_API_KEY`, if it has one.",
    )
    extend_stop_tokens: bool = option(
        False,
        "Whether end-of-sequence tokens of the expert that the policy does not have end a completion of either "
        "source. When `False`, such tokens are an error at construction.",
    )

    # Parameters that control the mixed rollouts
    num_mixed_generations: int = option(
        4,
        "Number of rollouts, among the `num_generations` of a prompt, that are drawn from the mixed policy. The "
        "others, none or at least 2, are on-policy. `0` is plain GRPO.",
    )
    branch_rule: str = option(
        "entropy",
        "Weight w of the expert at a token whose policy entropy is H (nats): `'entropy'`, w = min(1, H / gamma), the "
        "paper's; `'threshold'`, w = 1 where H >= gamma and else 0; `'random'`, w is everywhere `branch_share`; "
        "`'sentence'`, w is `branch_share` at the first `branch_span` tokens of a sentence and else 0; `'always'`, w "
        "= 1.",
        choices=BRANCH_RULES,
    )
    branch_share: float | None = option(
        None,
        "Weight of the branch rules `'random'` and `'sentence'`. If not set, 1 for `'sentence'`, and for `'random'` "
        "the mean weight of `'entropy'` over the batch's on-policy tokens (a control that does not look at the "
        "entropy).",
    )
    branch_span: int = option(
        4,
        "Number of first tokens of a sentence that branch with `branch_rule='sentence'`: those that stand at most so "
        "many behind a token that ends a sentence or line, the prompt's included.",
    )
    entropy_quantile: float = option(
        0.95,
        "gamma is this quantile of the token entropies of the on-policy rollouts of a rollout batch.",
    )
    entropy_threshold_from: str | None = option(
        None,
        "Rollout batch whose on-policy rollouts give gamma: `'previous'` (the paper), the one before, so that all "
        "rollouts are sampled at once, and the first batch takes its own; `'current'`, the same one, whose mixed "
        "rollouts are sampled after them. If not set, `'current'` with `guide_prompts='failing'`, else `'previous'`.",
        choices=THRESHOLD_SOURCES,
    )
    entropy_threshold_min: float = option(0.1, "Lower bound of gamma, in nats.")
    entropy_threshold: float | None = option(None, "Fixed gamma, in nats, instead of the quantile.")
    draft_length: int = option(
        8,
        "Number of tokens that the policy drafts between two consultations of the expert. It changes the speed, not "
        "the distribution. A server has its own (`mentor-trl serve --draft-length`).",
    )
    adaptive_draft_length: bool = option(
        False,
        "Whether to adapt the draft length, up to `draft_length`, to the measured acceptance.",
    )
    rollout_batch_size: int = option(
        64,
        "Number of rows that a process samples at once without vLLM. Finished rows are replaced by waiting ones.",
    )

    # Parameters that control expert trajectories in the place of rollouts
    num_trajectory_generations: int = option(
        0,
        "Number of rollouts, among the `num_generations` of a prompt, whose place a whole expert trajectory of the "
        "dataset takes (LUFFY: 1 of 8). Needs `num_mixed_generations=0`, and no expert.",
    )
    trajectory_column: str = option(
        "trajectory",
        "Column of the dataset with the text of the expert's reply. A row without one stays on-policy.",
    )
    trajectory_shaping: float = option(
        0.1,
        "Constant c of the policy shaping f(p) = p / (p + c) of the trajectories' tokens.",
    )

    # Parameters that control distillation: an expert that scores what the policy wrote
    distillation: str = option(
        "none",
        "What the expert's log-probabilities of the policy's tokens are used for, on GRPO's rows with "
        "`num_mixed_generations=0` and else on MENTOR's: `'none'`; `'opd'`, on-policy distillation, in which a token "
        "is worth log s - log p; `'gats'`, GRPO and on-policy distillation weighed by how far the policy's score is "
        "behind the expert's; `'distilled_rl'`, which weighs the tokens of rows with a positive advantage by s / p.",
        choices=DISTILLATIONS,
    )
    distillation_coef: float = option(
        1.0, "Weight lambda of on-policy distillation (`'opd'` and `'gats'`), which `'gats'` multiplies by the gap."
    )
    distillation_loss: str = option(
        "sampled",
        "How `'opd'` and `'gats'` distil: `'sampled'`, by the token that was drawn; `'full'`, by the reverse KL "
        "divergence of the distributions over the vocabulary, as a term of the loss; `'top_k'`, the same over the "
        "policy's `distillation_top_k` likeliest tokens and the rest as one. The latter two have less variance and "
        "need an expert in this process.",
        choices=DISTILLATION_LOSSES,
    )
    distillation_top_k: int = option(64, "Number of tokens of `distillation_loss='top_k'`.")
    distillation_reward: bool = option(
        False,
        "Whether `distillation='opd'` adds to the advantages of the rewards (OPD with reward). When `False`, rewards "
        "are logged only.",
    )
    distillation_clip: float = option(3.0, "Bound of s / p in `distillation='distilled_rl'`, and 1 / bound below.")
    gats_reference: float | None = option(
        None,
        "Mean reward of the expert, with which `distillation='gats'` compares the policy's. If not set, it is a "
        "moving average over the mixed rollouts, which must be there then.",
    )
    gats_smoothing: float = option(0.9, "Weight of the past in the moving averages of `distillation='gats'`.")

    # Parameters that control which groups are kept
    dynamic_sampling: int = option(
        0,
        "How many times at most groups of a rollout batch of which nothing is learned, as their on-policy rewards are "
        "all equal and no other row has an advantage, are sampled again with other prompts (DAPO). Every process "
        "must hold whole groups.",
    )

    # Parameters that control rollouts with vLLM
    vllm_weight_sync: str = option(
        "auto",
        "How the policy's weights reach a server: `'nccl'`; `'folder'`, safetensors files in `vllm_weight_sync_dir`; "
        "`'adapter'`, only the LoRA adapter, in that folder, with `expert_base_url` (the base may be quantized); or "
        "`'auto'`, NCCL from a CUDA device and else the folder.",
        choices=WEIGHT_SYNCS,
    )
    vllm_weight_sync_dir: str | None = option(
        None,
        "Folder that trainer and server see under the same name, for `vllm_weight_sync='folder'`. If not set, "
        "`_vllm_weights` in `output_dir`. On one machine a folder in memory, such as `/dev/shm/NAME`, is fastest.",
    )
    vllm_policy_server_base_url: str | None = option(
        None,
        "Address of a second server that holds the policy alone (`mentor-trl serve` without `--expert`). It samples "
        "on-policy rows and evaluation, at the speed of vLLM without drafts; gamma then comes from a forward pass of "
        "the training model over the on-policy rows. If not set, the one server samples all rows.",
    )
    vllm_read_timeout: float = option(
        1200.0,
        "Seconds to wait for the server's answer to one request, which comes when its completion is finished. What "
        "fails is tried again; a server may take `vllm_server_timeout` seconds to come back. Other processes wait "
        "for the main one meanwhile: keep `ddp_timeout` above the sum.",
    )
    vllm_server_api_key_file: str | None = option(
        None,
        "File with the key of the servers (`mentor-trl serve` prints where it is). If not set, the key is in the "
        "environment variable `MENTOR_TRL_API_KEY`, or found on the server's own machine.",
    )

    # Parameters that control the objective
    alpha: float = option(1.0, "Initial weight of the mixed rollouts' advantages (alpha_0).")
    alpha_schedule: str = option(
        "cosine",
        "How alpha falls to 0 over `expert_decay_steps`: `'cosine'`, `'linear'`, or `'constant'` (it does not). "
        "`'adaptive'`: until guidance does not help any more, by the measured difference of mixed and on-policy "
        "rewards, whatever `expert_decay_steps` is.",
        choices=SCHEDULES,
    )
    expert_decay_steps: int = option(
        120,
        "Number of rollout batches after which alpha is 0 and no mixed rollout is sampled any more. A rollout batch "
        "lasts `steps_per_generation * num_iterations / gradient_accumulation_steps` optimizer steps: 1 with TRL's "
        "defaults, 2 in the paper's setup.",
    )
    guidance_gap_exponent: float = option(
        0.0,
        "With `alpha_schedule='adaptive'`, alpha is `alpha` times the share of the mixed reward that guidance brings, "
        "to this power: with 0 it is `alpha` until guidance is withdrawn, with 1 it falls with that share.",
    )
    guidance_margin: float = option(
        0.1,
        "With `alpha_schedule='adaptive'`, guidance is withdrawn when the upper 95-percent bound of the difference is "
        "below this share of `reward_range` times the share of on-policy successes.",
    )
    guidance_patience: int = option(
        3, "Number of rollout batches in a row for which that bound must be below the margin."
    )
    guidance_smoothing: float = option(
        0.8, "Weight of a rollout batch in the measured difference, relative to the one behind it."
    )
    guidance_probe_every: int = option(
        20,
        "Once guidance is withdrawn, one rollout batch in so many has mixed rollouts again, which are counted and not "
        "learned from; guidance is back when they are better by more than the margin. 0: never, and the expert is "
        "freed.",
    )
    success_reward: float = option(0.5, "Reward from which on a rollout counts as a success.")
    guide_prompts: str | None = option(
        None,
        "Prompts that get mixed rollouts: `'all'` (the paper), or `'failing'`, those whose on-policy rollouts of the "
        "same batch succeed less often than `guide_below`; the others get on-policy rollouts instead. Reward "
        "functions then see a batch in two parts. Needs `entropy_threshold_from='current'`, and whole groups on each "
        "process. If not set, `'failing'` where these hold and some rollouts are on-policy, else `'all'`.",
        choices=GUIDED_PROMPTS,
    )
    guide_below: float | None = option(
        None,
        "Share of on-policy successes below which a prompt is guided with `guide_prompts='failing'`. If not set, only "
        "where all fail.",
    )
    guide_share: float = option(
        0.25,
        "Share of the prompts of a batch, drawn at random, that get mixed rollouts in any case with "
        "`alpha_schedule='adaptive'` and `guide_prompts='failing'`. Only these are compared: a comparison of failing "
        "prompts alone would always favour guidance.",
    )
    reward_range: float = option(
        1.0,
        "Largest possible difference of two rewards (R_range), by which the mixed advantages are divided.",
    )
    mixed_advantage_scale: str = option(
        "range",
        "What the mixed advantages are divided by: `'range'`, `reward_range`, the paper's; `'std'`, the standard "
        "deviation of the on-policy rewards of the group, plus 1e-4 (where they are all equal, a mixed success then "
        "has an advantage of 10,000 alpha); `'group_std'`, that of all rewards of the group, plus 1e-4.",
        choices=MIXED_SCALES,
    )
    correction: str = option(
        "temper",
        "Off-policy correction rho of a ratio r: `'temper'`, min(`correction_cap`, r)^`correction_exponent`; "
        "`'clip'`, r clipped to [`correction_floor`, `correction_cap`]; `'mask'`, r where r <= `correction_cap` and "
        "else 0; `'saturate'`, r / (r + `correction_constant`).",
        choices=CORRECTIONS,
    )
    correction_level: str = option(
        "conditional",
        "`'conditional'`: r = p / s at branch points and no correction elsewhere. `'mixture'`: r = p / m at every "
        "token of a mixed rollout (the expert then scores every token).",
        choices=CORRECTION_LEVELS,
    )
    correction_cap: float = option(1.0, "Upper bound of the ratio.")
    correction_floor: float = option(0.0, "Lower bound of the ratio with `correction='clip'`.")
    correction_exponent: float = option(
        0.25,
        "Exponent of `'temper'`: 0 is no correction (the paper), 1 truncated importance sampling.",
    )
    correction_constant: float = option(0.1, "Constant of `'saturate'`.")

    # Parameters that control the logging
    log_format: str = option(
        "line",
        "What is printed of each logged step: `'line'`, one line of the most important metrics that fit the terminal; "
        "`'full'`, all of them as a dict. `log.jsonl` in the output folder and trackers have all in any case.",
        choices=LOG_FORMATS,
    )
    log_rollout_records: int = option(
        0,
        "Number of rows of each rollout batch, of the main process, whose tokens are saved in `rollouts/` of the "
        "output folder for `mentor-trl plot rollout`. 0 saves none.",
    )

    def __post_init__(self):
        self._given = given_fields(self)
        # TRL's default, which needs an accelerator, or `use_cpu`
        if self.bf16 is None and not self.use_cpu and not torch.accelerator.is_available():
            self.bf16 = False
        super().__post_init__()
        fill_guided_prompts(self)
        self._check_choices()
        self._check_group()
        self._check_ranges()
        check_trajectories(self)
        check_distillation(self)
        check_dynamic_sampling(self)
        if self.num_mixed_generations > 0:
            check_sampling(self)
            check_expert_server(self)
            check_guided_prompts(self)

    def _check_choices(self) -> None:
        for name, choices in (
            ("branch_rule", BRANCH_RULES),
            ("entropy_threshold_from", THRESHOLD_SOURCES),
            ("alpha_schedule", SCHEDULES),
            ("guide_prompts", GUIDED_PROMPTS),
            ("correction", CORRECTIONS),
            ("correction_level", CORRECTION_LEVELS),
            ("mixed_advantage_scale", MIXED_SCALES),
            ("distillation", DISTILLATIONS),
            ("distillation_loss", DISTILLATION_LOSSES),
            ("expert_dtype", ("auto", "bfloat16", "float16", "float32")),
            ("vllm_weight_sync", WEIGHT_SYNCS),
            ("log_format", LOG_FORMATS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}."
                )

    def _check_group(self) -> None:
        n, mixed = self.num_generations, self.num_mixed_generations
        if mixed < 0:
            raise ValueError(f"`num_mixed_generations` is {mixed}; set it to 0 (plain GRPO) or more.")
        if mixed > n:
            raise ValueError(
                f"`num_mixed_generations={mixed}` is more than `num_generations={n}`. Set `num_mixed_generations` "
                f"to {max(n - 2, 0)} or less, or raise `num_generations` to {mixed + 2} or more."
            )
        if mixed and n - mixed == 1:
            raise ValueError(
                f"`num_mixed_generations={mixed}` leaves 1 of `num_generations={n}` rollouts on-policy, and the "
                f"baseline needs at least 2. Set `num_mixed_generations` to {n - 2} or less, or raise "
                f"`num_generations` to {mixed + 2} or more. (With {n}, all rollouts are mixed.)"
            )
        if mixed and mixed == n and self.alpha_schedule == "adaptive":
            raise ValueError(
                "`alpha_schedule='adaptive'` compares mixed with on-policy rollouts, and "
                f"`num_mixed_generations={mixed}` of {n} leaves none of these. Choose another schedule, or set "
                f"`num_mixed_generations` to {n - 2} or less."
            )
        if mixed and mixed == n and self.entropy_threshold_from == "current":
            raise ValueError(
                f"`entropy_threshold_from='current'` takes gamma from on-policy rollouts, and "
                f"`num_mixed_generations={mixed}` of {n} leaves none. Set it to 'previous', or "
                f"`num_mixed_generations` to {n - 2} or less."
            )

    def _check_ranges(self) -> None:
        def require(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be {what}.")

        require(0.0 <= self.entropy_quantile <= 1.0, "entropy_quantile", "between 0 and 1")
        require(self.entropy_threshold_min > 0.0, "entropy_threshold_min", "a positive number of nats, e.g. 0.1")
        require(
            self.entropy_threshold is None or self.entropy_threshold > 0.0,
            "entropy_threshold",
            "a positive number of nats, or unset to use `entropy_quantile`",
        )
        require(
            self.branch_share is None or 0.0 < self.branch_share <= 1.0,
            "branch_share",
            "above 0 and at most 1, or unset",
        )
        require(self.branch_span >= 1, "branch_span", "at least 1")
        require(self.vllm_read_timeout > 0.0, "vllm_read_timeout", "a positive number of seconds")
        require(self.draft_length >= 1, "draft_length", "at least 1")
        require(self.rollout_batch_size >= 1, "rollout_batch_size", "at least 1")
        require(self.log_rollout_records >= 0, "log_rollout_records", "0 (none) or more")
        require(self.alpha >= 0.0, "alpha", "0 or more")
        require(self.expert_decay_steps >= 1, "expert_decay_steps", "at least 1 (for no guidance set `alpha` to 0)")
        require(self.guidance_gap_exponent >= 0.0, "guidance_gap_exponent", "0 or more")
        require(self.guidance_margin > 0.0, "guidance_margin", "positive, e.g. 0.1")
        require(self.guidance_patience >= 1, "guidance_patience", "at least 1")
        require(0.0 <= self.guidance_smoothing < 1.0, "guidance_smoothing", "at least 0 and below 1")
        require(self.guidance_probe_every >= 0, "guidance_probe_every", "0 (never) or more")
        require(
            self.guide_below is None or 0.0 < self.guide_below <= 1.0,
            "guide_below",
            "above 0 and at most 1, or unset",
        )
        require(0.0 < self.guide_share <= 1.0, "guide_share", "above 0 and at most 1")
        require(self.reward_range > 0.0, "reward_range", "positive")
        require(self.correction_cap > 0.0, "correction_cap", "positive (`inf` for no cap)")
        require(
            0.0 <= self.correction_floor <= self.correction_cap, "correction_floor", "between 0 and correction_cap"
        )
        require(self.correction_exponent >= 0.0, "correction_exponent", "0 or more")
        require(self.correction_constant > 0.0, "correction_constant", "positive")
        require(self.distillation_coef > 0.0, "distillation_coef", "positive (or set `distillation` to 'none')")
        require(self.distillation_top_k >= 1, "distillation_top_k", "at least 1")
        require(self.distillation_clip >= 1.0, "distillation_clip", "at least 1 (Distilled RL: 3)")
        require(self.gats_reference is None or self.gats_reference > 0.0, "gats_reference", "positive, or unset")
        require(0.0 <= self.gats_smoothing < 1.0, "gats_smoothing", "at least 0 and below 1")
        require(self.trajectory_shaping > 0.0, "trajectory_shaping", "positive (LUFFY: 0.1)")
        require(
            not (self.expert_load_in_4bit and self.expert_load_in_8bit),
            "expert_load_in_4bit",
            "False where `expert_load_in_8bit` is True",
        )

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set to something else than their defaults, as they were given."""
        return self._given

    @property
    def device(self) -> torch.device:
        # accelerate numbers the processes of a CPU (`cpu:0`), which torch.load does not know
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def default_config(model: Any, expert: Any) -> MentorGRPOConfig:
    """
    The configuration of a trainer that is given none.

    Raises:
        [`SetupError`]: if it is given no expert either.
    """
    if expert is None:
        raise SetupError(
            'MentorGRPOTrainer needs an expert: pass `expert="MODEL"`, or `args=MentorGRPOConfig(output_dir, '
            'expert_model_name_or_path="MODEL")`, or for plain GRPO `args=MentorGRPOConfig(output_dir, '
            "num_mixed_generations=0)`."
        )
    name = model if isinstance(model, str) else model.config._name_or_path
    return MentorGRPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-MENTOR")
