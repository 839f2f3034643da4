"""MENTOR as seams over TRL's GRPOTrainer: who samples which row, and what its tokens are worth."""

import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed import ReduceOp
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from .algorithms.guidance import Guidance
from .algorithms.luffy import TrajectoryRows, end_of_reply, shape_rows
from .config import MentorGRPOConfig
from .errors import SetupError
from .experts.load import (
    check_context_length,
    check_expert_source,
    check_stop_ids,
    check_stop_tokens,
    check_vocabulary,
    resolve_expert,
    untouched_rng,
)
from .objective import correction_weights, fold_correction, mixed_policy_advantages
from .publishing.card import complete_card
from .publishing.hub import model_files_only
from .publishing.papers import LUFFY_PAPER, MENTOR_PAPER
from .rollout import LocalSampler, MixedRequest, MixedRollout, mixed_rows
from .rollout.local.decoder import check_decoding
from .rollout.vllm.backend import EngineSettings, mixed_generation, policy_logps
from .rollout.vllm.server import ServerError
from .training.checkpoint import StepStart, load_state, save_last_step, save_state
from .training.forward import policy_entropies
from .training.metrics import PREFIX, guidance_metrics, row_metrics, share_without_spread, token_means, token_sums
from .training.rollout_log import collect_records, save_records
from .training.tables import evaluation_table, new_logs
from .training.validation import check_dataset, check_engine, check_expert_given, check_supported, check_trajectories


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MentorGRPOTrainer(GRPOTrainer):
    r"""
    Trainer for MENTOR: GRPO in which some rollouts of each prompt are drawn from a mixed policy, whose tokens come
    from an expert where the policy's entropy is high. The method was introduced in [Selective Expert Guidance for
    Effective and Diverse Exploration in Reinforcement Learning of LLMs](https://huggingface.co/papers/2510.04140).
    With `num_trajectory_generations` it is the baseline [LUFFY](https://huggingface.co/papers/2504.14945) instead,
    which needs no expert: some rollouts of each prompt are expert trajectories from the dataset.

    Everything that [`~trl.GRPOTrainer`] documents holds; tools, environments, `rollout_func` and images are refused
    while rollouts are mixed, and so are, without vLLM, FSDP and ZeRO-3 without gathered parameters. Evaluation never
    uses the expert. With `use_vllm` one vLLM engine speaks for policy and expert, in a server
    (`mentor-trl serve`) or in this process, and the expert is a name, not a model.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory:
            See [`~trl.GRPOTrainer`].
        args ([`MentorGRPOConfig`], *optional*):
            Configuration.
        expert (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Expert, instead of `args.expert_model_name_or_path`: an id, a folder, an adapter folder, or a model.
        expert_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the expert. Loaded from where the expert came from when not given.

    Example:
    ```python
    trainer = MentorGRPOTrainer(
        model="Qwen/Qwen2.5-3B",
        reward_funcs=[accuracy_reward, format_reward],
        args=MentorGRPOConfig(reward_weights=[0.9, 0.1]),
        train_dataset=dataset,
        expert="open-r1/OpenR1-Qwen-7B",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "mentor"]
    _name = "MENTOR"
    _paper = MENTOR_PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs=None,
        args: MentorGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: "PreTrainedTokenizerBase | None" = None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config: "PeftConfig | None" = None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
        *,
        expert: "str | PreTrainedModel | PeftModel | None" = None,
        expert_processing_class: "PreTrainedTokenizerBase | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = MentorGRPOConfig(f"{name.split('/')[-1]}-MENTOR")
        if not isinstance(args, MentorGRPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; MentorGRPOTrainer needs a MentorGRPOConfig, which takes the same "
                "fields and those of MENTOR."
            )
        self._guided = args.num_mixed_generations > 0
        if self._guided:
            check_supported(args, tools, rollout_func, environment_factory)
            check_expert_given(args, expert)
        elif args.num_trajectory_generations:
            check_trajectories(args, train_dataset, tools, rollout_func, environment_factory)
            self._tag_names, self._name, self._paper = ["trl", "luffy"], "LUFFY", LUFFY_PAPER
        else:
            self._tag_names, self._name = GRPOTrainer._tag_names, GRPOTrainer._name
            self._paper = GRPOTrainer._paper
        if environment_factory is None:  # an environment may bring the prompts
            check_dataset(train_dataset, "train_dataset", self._guided)
            check_dataset(eval_dataset, "eval_dataset", self._guided)
        source = expert if expert is not None else args.expert_model_name_or_path
        served = self._guided and args.use_vllm
        if served:
            check_engine(args, source, model, quantization_config)
        # A server's expert may lie on the server's disk alone
        if self._guided and isinstance(source, str) and not (served and args.vllm_mode == "server"):
            check_expert_source(source, args.expert_model_revision, args.trust_remote_code)

        with mixed_generation(EngineSettings.of(args, source)) if served else nullcontext():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )

        self.guidance = Guidance(
            schedule=args.alpha_schedule,
            alpha_0=args.alpha,
            decay_steps=args.expert_decay_steps,
            quantile=args.entropy_quantile,
            minimum=args.entropy_threshold_min,
            fixed=args.entropy_threshold,
        )
        self.sampler: LocalSampler | None = None
        self.train_sampler = None  # stays `None` for a stream
        self.expert_name: str | None = None
        self.recipe: dict[str, Any] | None = None  # options of the command line, for the model card
        # Evaluation fills the same deques as training in TRL, and its rows would end up in the training table
        self.logs_by_mode = {"train": self._logs, "eval": new_logs()}
        self._mixed_B: torch.Tensor | None = None
        self._rollout: MixedRollout | None = None
        self._parts: list[tuple[str, list[int], MixedRollout]] = []
        self._rho_B_T: torch.Tensor | None = None
        self._rewards_N_F: torch.Tensor | None = None
        self.trajectories: TrajectoryRows | None = None
        self.sources = ("on_policy", "trajectory" if args.num_trajectory_generations else "mixed")
        self._loss_inputs: dict[str, Any] = {}
        self._loss_pass: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shaping_B_T: torch.Tensor | None = None
        self._completion_ids: list[list[int]] = []
        self._range_warned = False
        self.step_start = StepStart(self)
        if not self._guided and not args.num_trajectory_generations:
            return
        other = self.sources[1]
        if self._is_vlm:
            raise SetupError(
                f"The processing class is multimodal, and {other} rollouts are text only. Pass the tokenizer as "
                f"`processing_class`, or set `num_{other}_generations=0`."
            )
        if args.beta != 0.0:
            warnings.warn(
                f"`beta={args.beta}`: the KL estimator assumes samples of the policy, so it is biased on {other} "
                f"rollouts. Compare `mentor/on_policy/kl` with `mentor/{other}/kl`.",
                stacklevel=2,
            )
        if not self._guided:
            self._prepare_trajectories()
            return
        with untouched_rng():
            if served:
                self._prepare_engine(source, expert_processing_class)
            else:
                self._prepare_expert(source, expert_processing_class)

    def _prepare_trajectories(self) -> None:
        args, template = self.args, {"chat_template": self.chat_template, **self.chat_template_kwargs}
        self.trajectories = TrajectoryRows(
            args.trajectory_column,
            args.num_trajectory_generations,
            self.num_generations,
            self._tokenizer,
            self.eos_token_ids,
            end_of_reply(self._tokenizer, self.eos_token_ids, **template),
            self.max_completion_length,
        )
        self.trajectories.check(self.train_dataset)

    def _prepare_engine(self, expert: str | None, tokenizer) -> None:
        """Check that the vLLM engine, which is running by now, fits the policy."""
        engine = self.vllm_generation
        policy = self.accelerator.unwrap_model(self.model)
        engine.check(policy, expert, tokenizer, self._longest_prompt())
        self.expert_name = engine.info["expert"]
        stop = check_stop_ids(
            self.eos_token_ids, engine.info["expert_stop_ids"], self._tokenizer, self.args.extend_stop_tokens
        )
        self.eos_token_ids, engine.stop_token_ids = stop, tuple(stop)
        self.add_callback(self.step_start)

    def _prepare_expert(self, source, tokenizer) -> None:
        """Load the expert, check that it fits the policy, and build the engine."""
        args = self.args
        expert, tokenizer, self.expert_name = resolve_expert(source, tokenizer, args)
        policy = self.accelerator.unwrap_model(self.model)
        check_vocabulary(policy, expert, self._tokenizer, tokenizer)
        self.eos_token_ids = check_stop_tokens(self.eos_token_ids, expert, tokenizer, args.extend_stop_tokens)
        self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = self.eos_token_ids
        if getattr(expert, "hf_device_map", None) is None:
            expert.to(self.accelerator.device)
        longest = self._longest_prompt()
        for model, name in ((policy, "policy"), (expert, "expert")):
            check_context_length(model, name, longest, args.max_completion_length)
            if name == "expert" or not self._dist.is_zero3:
                check_decoding(model, name)
        self.sampler = LocalSampler(
            expert,
            num_tokens=max(self._tokenizer.get_vocab().values()) + 1,
            rollout_batch_size=args.rollout_batch_size,
            draft_length=args.draft_length,
            adaptive_draft_length=args.adaptive_draft_length,
        )

    def _longest_prompt(self, candidates: int = 256) -> int:
        """Tokens of the longest training prompt, among those with the most bytes; 0 for a stream."""
        if not hasattr(self.train_dataset, "__len__"):
            return 0
        prompts = sorted(self.train_dataset["prompt"], key=lambda prompt: len(str(prompt).encode()))[-candidates:]
        return max(len(ids) for ids in self._tokenize_prompts(prompts)[0])

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # Rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self._guided_batch(inputs)
        except ServerError:
            if self.is_in_train:
                save_last_step(self, self.step_start if self._mode == "train" else None)
            raise

    def _guided_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._logs = self.logs_by_mode[self._mode]
        self._mixed_B = self._rollout = self._rho_B_T = None
        self._parts = []
        if self.trajectories is not None:
            self.trajectories.end()
        if self._mode == "eval":
            return super()._generate_and_score_completions(inputs)
        if self.guidance.over:
            self._release_expert()
        alpha, count = self.guidance.alpha, len(inputs)
        if self._guided and alpha > 0.0:
            first = self.accelerator.process_index * count
            self._mixed_B = mixed_rows(first, count, self.num_generations, self.args.num_mixed_generations)
        if self.trajectories is not None:
            self.trajectories.begin(inputs, self.accelerator.process_index * count)
        output = super()._generate_and_score_completions(inputs)
        rewards_N = self._weighted_rewards()
        if self._mixed_B is None:
            mixed_N = torch.zeros_like(rewards_N, dtype=torch.bool)
            advantages_N = self.accelerator.gather(output["advantages"])
            if self.trajectories is not None:
                mixed_N = self.accelerator.gather(self.trajectories.mask(count).to(self.accelerator.device))
                self._log_metrics({f"{PREFIX}trajectory/missing": self.trajectories.missing(mixed_N)})
        else:
            mixed_N = mixed_rows(0, len(rewards_N), self.num_generations, self.args.num_mixed_generations)
            mixed_N = mixed_N.to(rewards_N.device)
            advantages_N = self._guide(output, rewards_N, mixed_N, alpha)
        local = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        output[f"mentor_{self.sources[1]}"] = mixed_N[local]
        self._log_rows(mixed_N, rewards_N, advantages_N, alpha)
        self._save_records(inputs, rewards_N[local], advantages_N[local], alpha)
        self.guidance.batches += 1
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self._mixed_B is None:
            # All rows, as TRL's engines assign groups by position; those of trajectories are thrown away
            completion_ids, logps = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
            if self.trajectories is None:
                return completion_ids, logps
            return self.trajectories.place(prompt_ids, completion_ids, logps)
        return self._sample(prompt_ids)

    def _sample(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """
        On-policy rows, gamma from their entropies, then mixed rows. Returns completions, and log-probabilities where
        the engine's p is not quite that of the training model.
        """
        with self._sampling_session() as session:
            indices = [(self._mixed_B == mixed).nonzero().flatten().tolist() for mixed in (False, True)]
            with profiling_context(self, "mentor.on_policy"):
                on_policy = session.sample(self._request([prompt_ids[i] for i in indices[0]], float("inf"), 0))
            entropies = on_policy.entropies[on_policy.mask]
            if self.args.vllm_policy_server_base_url is not None:
                entropies = policy_entropies(self, [prompt_ids[i] for i in indices[0]], on_policy.completion_ids)
            self.guidance.update(self._gather_tokens(entropies))
            with profiling_context(self, "mentor.mixed"):
                request = self._request([prompt_ids[i] for i in indices[1]], self.guidance.gamma, 1)
                self._rollout = session.sample(request)
        self._parts = [("on_policy", indices[0], on_policy), ("mixed", indices[1], self._rollout)]
        for source, _, rollout in self._parts:
            self._log_speed(source, rollout.stats)
        parts = [(rows, rollout) for _, rows, rollout in self._parts]
        completion_ids = scatter([(rows, rollout.completion_ids) for rows, rollout in parts], len(prompt_ids))
        if not self.use_vllm:
            return completion_ids, None
        return completion_ids, scatter([(rows, policy_logps(rollout)) for rows, rollout in parts], len(prompt_ids))

    @contextmanager
    def _sampling_session(self):
        if self.use_vllm:
            if self.state.global_step != self._last_loaded_step:
                with profiling_context(self, "sync_weights"):
                    self.vllm_generation.sync_weights()
                self._last_loaded_step = self.state.global_step
            with self.vllm_generation.session() as session:
                yield session
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            self.sampler.session(policy, self.accelerator.autocast, self.args.cast_lm_head_to_fp32) as session,
        ):
            yield session

    def _request(self, prompt_ids: list[list[int]], gamma: float, source: int) -> MixedRequest:
        entropy = [self.args.seed, self.accelerator.process_index, self.guidance.batches, source]
        return MixedRequest(
            prompt_ids=prompt_ids,
            gamma=[gamma] * len(prompt_ids),
            max_new_tokens=self.max_completion_length,
            stop_token_ids=tuple(self.eos_token_ids),
            temperature=self.temperature,
            branch_rule=self.args.branch_rule,
            share=self.guidance.share,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
            score_all=self.args.correction_level == "mixture",
        )

    def _gather_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes, `(N,)`, from any number on each."""
        values = values.to(self.accelerator.device)
        padded = self.accelerator.pad_across_processes(values, pad_index=torch.nan)
        gathered = self.accelerator.gather(padded)
        return gathered[~gathered.isnan()]

    def _release_expert(self) -> None:
        if self.sampler is not None and self.sampler.expert is not None:
            self.sampler.expert = None
            if torch.accelerator.is_available():
                torch.accelerator.memory.empty_cache()

    # Objective

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._completion_ids = completion_ids_list
        self._log_completion_extra("source", self._sources(len(prompts)))
        self._rewards_N_F = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_N_F

    def _sources(self, count: int) -> list[str]:
        """Where this process's rows came from, as the completions table says it."""
        if self._mode == "eval":
            return ["eval"] * count
        rows_B = self._mixed_B if self.trajectories is None else self.trajectories.mask(count)
        return ["on_policy"] * count if rows_B is None else [self.sources[row] for row in rows_B.tolist()]

    def _weighted_rewards(self) -> torch.Tensor:
        """Rewards of all processes' rows, NaN where every function returned `None`."""
        rewards_N = (self._rewards_N_F * self.reward_weights.to(self._rewards_N_F.device)).nansum(dim=1)
        return rewards_N.masked_fill(self._rewards_N_F.isnan().all(dim=1), torch.nan)

    def _guide(self, output: dict[str, Any], rewards_N: torch.Tensor, mixed_N: torch.Tensor, alpha: float):
        """Replace TRL's advantages by MENTOR's, per token; returns those of all rows before correction."""
        args, device = self.args, output["completion_ids"].device
        self._check_reward_range(rewards_N)
        advantages_N = mixed_policy_advantages(
            rewards_N, mixed_N, self.num_generations, alpha, args.reward_range, self.scale_rewards
        )
        count, length = output["completion_ids"].shape
        rollout = self._rollout.padded(length)
        trainer_logps = None
        if self._corrects_engine:
            # Where a row is left out (`mask_truncated_completions`), TRL computes them without its tokens
            kept = output["completion_mask"].bool()
            trainer_logps = output["old_per_token_logps"].where(kept, torch.nan)[self._mixed_B]
        ratio_B_T, rho_B_T, where_B_T = self._correction(rollout, trainer_logps)
        rho = torch.ones((count, length), device=device)
        rho[self._mixed_B.to(device)] = rho_B_T.to(device)
        local = slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        output["advantages"] = fold_correction(advantages_N[local], rho)
        self._rho_B_T = rho

        self._log_metrics(guidance_metrics(rollout, ratio_B_T, rho_B_T, where_B_T, self._reduce))
        self._log_metrics({f"{PREFIX}gamma": self.guidance.gamma})
        self._metrics["train"]["frac_reward_zero_std"][-1] = share_without_spread(
            rewards_N, mixed_N, self.num_generations
        )
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages_N), len(logged))):
            logged.pop()
        logged.extend(advantages_N.tolist())
        return advantages_N

    @property
    def _corrects_engine(self) -> bool:
        """Whether TRL corrects the difference between the training model and the engine that sampled."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    def _correction(
        self, rollout: MixedRollout, trainer_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Ratios r, weights rho and corrected tokens of the mixed rows, `(rows, T)` each.

        At a branch point p is that of the training model, `trainer_logps` of shape `(rows, T)`, where TRL's
        engine-mismatch correction is on: it leaves these tokens to us. Elsewhere, or where it is off, p is the
        engine's.
        """
        args, logps = self.args, rollout.logps
        if trainer_logps is not None:
            trainer_logps = trainer_logps.to(logps)
            logps = torch.where(rollout.branch & ~trainer_logps.isnan(), trainer_logps, logps)
        if args.correction_level == "mixture":
            log_ratio, where = logps - rollout.mixed_logps, rollout.mask
        else:
            log_ratio, where = logps - rollout.expert_logps, rollout.branch
        rho = correction_weights(
            log_ratio,
            where,
            kind=args.correction,
            cap=args.correction_cap,
            floor=args.correction_floor,
            exponent=args.correction_exponent,
            constant=args.correction_constant,
        )
        return log_ratio.exp(), rho, where

    def _check_reward_range(self, rewards_N: torch.Tensor) -> None:
        finite = rewards_N[rewards_N.isfinite()]
        spread = (finite.max() - finite.min()).item() if finite.numel() else 0.0
        if spread > self.args.reward_range * (1 + 1e-6) and not self._range_warned:
            self._range_warned = True
            warnings.warn(
                f"Rewards of this batch differ by {spread:.4g}, more than `reward_range={self.args.reward_range}`, so "
                "mixed advantages exceed alpha. Set `reward_range` to the largest possible difference.",
                stacklevel=2,
            )

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if kwargs.get("compute_entropy"):  # only the loss asks for entropies
            self._loss_pass = result[0].detach(), result[1].detach()
            if self._loss_inputs.get("mentor_trajectory") is not None:
                # The loss reads advantages and ratios only now
                self._shaping_B_T = shape_rows(self._loss_inputs, self._loss_pass[0], self.args.trajectory_shaping)
        return result

    def _compute_loss(self, model, inputs):
        self._loss_inputs = inputs = dict(inputs)  # rollouts are used again by later steps
        loss = super()._compute_loss(model, inputs)
        if self._mode == "train":
            logps, entropies = self._loss_pass
            values = {"entropy": entropies}
            if self.beta != 0.0:
                log_ratio = inputs["ref_per_token_logps"] - logps
                values["kl"] = log_ratio.exp() - log_ratio - 1
            if self._shaping_B_T is not None:
                values["shaping"] = self._shaping_B_T
            sums = token_sums(values, inputs["completion_mask"], inputs[f"mentor_{self.sources[1]}"])
            means = token_means(self._reduce(sums, "sum"), list(values), self.sources)
            means.pop(f"{PREFIX}on_policy/shaping", None)  # 1 everywhere
            self._log_metrics(means)
        self._loss_inputs, self._loss_pass, self._shaping_B_T = {}, None, None
        return loss

    # Metrics, tables, model card

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        values = values.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            operations = {"sum": ReduceOp.SUM, "min": ReduceOp.MIN, "max": ReduceOp.MAX}
            torch.distributed.all_reduce(values, op=operations[how])
        return values

    def _log_speed(self, source: str, stats: dict[str, float]) -> None:
        tokens, seconds = self._reduce(torch.tensor([stats["tokens"], stats["seconds"]], dtype=torch.float32), "sum")
        if tokens > 0:
            seconds = seconds / self.accelerator.num_processes
            self._log_metrics({f"{PREFIX}{source}/tokens_per_second": (tokens / seconds).item()})

    def _log_rows(self, mixed_N, rewards_N, advantages_N, alpha: float) -> None:
        device = self.accelerator.device
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        lengths = torch.tensor([len(ids) for ids in self._completion_ids], device=device)
        truncated = torch.tensor([ids[-1] not in ends for ids in self._completion_ids], device=device)
        metrics = row_metrics(
            mixed_N,
            rewards_N,
            self._rewards_N_F,
            self.reward_func_names,
            advantages_N,
            self.accelerator.gather(lengths),
            self.accelerator.gather(truncated),
            self.sources,
        )
        self._log_metrics(metrics)
        if self._guided:
            self._log_metrics({f"{PREFIX}alpha": alpha})

    def _save_records(self, inputs, rewards_B: torch.Tensor, advantages_B: torch.Tensor, alpha: float) -> None:
        """Keep the tokens of the first rows of the main process, for `mentor-trl plot rollout`."""
        if not (self._parts and self.args.log_rollout_records and self.accelerator.is_main_process):
            return
        records = collect_records(
            step=self.state.global_step + 1,
            parts=self._parts,
            prompts=[row["prompt"] for row in inputs],
            rewards=rewards_B.tolist(),
            advantages=advantages_B.tolist(),
            rho_B_T=self._rho_B_T,
            tokenizer=self._tokenizer,
            gamma=self.guidance.gamma,
            alpha=alpha,
            limit=self.args.log_rollout_records,
        )
        save_records(self.args.output_dir, records)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._logs = self.logs_by_mode[self._mode]
        if self._mode == "train":
            return super().log(logs, start_time)
        # `eval`, or `eval_NAME` where there are several evaluation datasets
        name = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
        with evaluation_table(self, name):
            super().log(logs, start_time)
        self.logs_by_mode["eval"] = new_logs()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, results=None):
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_card(
                self.args,
                self.state,
                base=self.model.config._name_or_path,
                expert=self.expert_name,
                rewards=list(zip(self.reward_func_names, self.reward_weights.tolist())),
                recipe=self.recipe,
                dataset_name=dataset_name,
                results=results,
                training=self.is_in_train,
            )

    def push_to_hub(self, *args, **kwargs):
        with model_files_only(self.args):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        with model_files_only(self.args):
            super()._push_from_checkpoint(checkpoint_folder)

    # Checkpoints

    def _get_train_sampler(self, dataset=None):
        self.train_sampler = super()._get_train_sampler(dataset)
        return self.train_sampler

    # Not `_save_checkpoint`, which pushes the folder to the Hub before it returns
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self, checkpoint)


def scatter(parts: list[tuple[list[int], list[Any]]], count: int) -> list[Any]:
    """
    Put values back to the rows they belong to.

    >>> scatter([([0, 2], ["a", "c"]), ([1], ["b"])], 3)
    ['a', 'b', 'c']
    """
    values = [None] * count
    for rows, part in parts:
        for row, value in zip(rows, part, strict=True):
            values[row] = value
    return values
