"""TRL's GRPOTrainer as a host: the hooks through which an algorithm and its engine take part in a training step."""

import os
import warnings
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing

from .algorithms import Algorithm, Context, Rollouts, algorithm_of
from .analysis.rendering import evaluation_excerpts, excerpt
from .config import MentorGRPOConfig, default_config
from .errors import EngineError
from .publishing.card import complete_card
from .publishing.hub import model_files_only
from .publishing.recipe import save as save_recipe
from .publishing.recipe import script_recipe
from .random_state import untouched_rng
from .rollout.choice import engine_setup
from .rollout.host import Host, longest_prompt
from .rollout.progress import SamplingProgress
from .training.batch import RolloutBatch, Scored, leave_out
from .training.checkpoint import RunCallback, copy_logs, load_state, restore_logs, resume_advice, save_state
from .training.console import fit_console, fit_tokenizer, show
from .training.forward import TokenPass, policy_entropies, policy_logps
from .training.loss_pass import LossPass
from .training.metrics import batch_metrics
from .training.processes import Processes
from .training.resampling import Filled, Resampling, Round, aside
from .training.resume import check_expert_kept, check_one_batch, usable_checkpoint, warn_of_missing
from .training.reward_functions import checked_rewards, warn_of_undefined
from .training.reward_parts import RewardParts
from .training.rollout_log import RolloutRecord
from .training.tables import evaluation_log, new_logs, printed, replace_last
from .training.trackers import fit_trackers


class MentorGRPOTrainer(GRPOTrainer):
    r"""
    Trainer for MENTOR: GRPO in which some rollouts of each prompt are drawn from a mixed policy, whose tokens come
    from an expert where the policy's entropy is high. The method was introduced in [Selective Expert Guidance for
    Effective and Diverse Exploration in Reinforcement Learning of LLMs](https://huggingface.co/papers/2510.04140).
    With `num_trajectory_generations` it is the baseline [LUFFY](https://huggingface.co/papers/2504.14945) instead,
    which needs no expert: some rollouts of each prompt are expert trajectories from the dataset. The method is an
    [`~mentor_trl.algorithms.Algorithm`], and this class only lends it TRL's hooks.

    Everything that [`~trl.GRPOTrainer`] documents holds; what an algorithm or engine does not support is refused at
    construction. Evaluation never uses the expert. It is a model in this process; with `use_vllm` a name, and one vLLM
    engine, here or in a server (`mentor-trl serve`), holds it too; with `expert_base_url` a stock vLLM server.

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
        algorithm (`type[Algorithm]`, *optional*):
            Class of an [`~mentor_trl.algorithms.Algorithm`] of your own. The configuration chooses one if not given.

    Raises:
        [`~mentor_trl.errors.SetupError`]: if models, data or options do not fit together.

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

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs=None,
        args: MentorGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
        *,
        expert: str | PreTrainedModel | PeftModel | None = None,
        expert_processing_class: PreTrainedTokenizerBase | None = None,
        algorithm: type[Algorithm] | None = None,
    ):
        if args is None:
            args = default_config(model, expert)
        if not isinstance(args, MentorGRPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; MentorGRPOTrainer needs a MentorGRPOConfig, which takes the same "
                "fields and those of MENTOR."
            )
        components = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        self.algorithm = (algorithm or algorithm_of(args))(args)
        self.algorithm.check(train_dataset, eval_dataset, **components)
        self._tag_names, self._name, self._paper = self.algorithm.tags, self.algorithm.name, self.algorithm.paper
        setup = engine_setup(args, expert, expert_processing_class, self.algorithm.needs_expert)
        setup.check(model, quantization_config)
        with setup.building():
            super().__init__(
                model=model,
                reward_funcs=checked_rewards(reward_funcs),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **components,
            )
        fit_trackers(self.callback_handler, args)
        fit_console(self.callback_handler, args.log_format)
        self.num_completions_to_print = 0  # TRL's table, which is unreadable at 80 columns
        self.examples: list[RolloutRecord] = []  # rollouts to print with the next line of the log
        self.recipe: dict[str, Any] | None = None  # options of the command line, or what a script has set
        # Evaluation fills the same deques as training in TRL, and its rows would end up in the training table
        self.logs_by_mode = {"train": self._logs, "eval": new_logs()}
        self.batch: RolloutBatch | None = None  # the latest of training
        self._loss_pass: LossPass | None = None
        self.processes = Processes(self.accelerator)
        self.resampling = Resampling(args, self.train_dataset, self.processes, self._tokenizer.pad_token_id)
        host = Host(
            args=args,
            accelerator=self.accelerator,
            policy=self.accelerator.unwrap_model(self.model),
            sharded=self._dist.is_zero3,
            tokenizer=self._tokenizer,
            stop_token_ids=self.eos_token_ids,
            longest_prompt=lambda: longest_prompt(self.train_dataset, lambda rows: self._tokenize_prompts(rows)[0]),
            unwrapped=self._unwrapped,
            sync_weights=self._sync_weights,
            vllm_generation=getattr(self, "vllm_generation", None),
        )
        with untouched_rng():
            self.engine = setup.build(host)
        self._set_stop_tokens(self.engine.stop_token_ids)
        context = Context(
            args=args,
            tokenizer=self._tokenizer,
            stop_token_ids=self.eos_token_ids,
            template={"chat_template": self.chat_template, **self.chat_template_kwargs},
            processes=self.processes,
            engine=self.engine,
            train_dataset=self.train_dataset,
            multimodal=self._is_vlm,
        )
        self.algorithm.prepare(context)
        self.run_callback = RunCallback(self._forget_weights, self._run_state if self.engine.remote else None)
        self.add_callback(self.run_callback)

    def _unwrapped(self):
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _sync_weights(self) -> None:
        if self.state.global_step != self._last_loaded_step:
            with profiling_context(self, "sync_weights"):
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    def _forget_weights(self) -> None:
        self._last_loaded_step = -1

    def _set_stop_tokens(self, ids: list[int]) -> None:
        if ids == self.eos_token_ids:
            return
        self.eos_token_ids = ids
        if hasattr(self, "generation_config"):  # TRL generates itself
            self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = ids

    def _forward(self, *args, **kwargs):
        """Forward passes of the training model outside of the loss."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(self.model, *args, **kwargs)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # Rollouts and their loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._logs = self.logs_by_mode[self._mode]
        try:
            if self._mode == "eval":
                return super()._generate_and_score_completions(inputs)
            self.algorithm.spare(self.engine)
            first = self._sample(inputs)
            filled = self.resampling.fill(first, self._logs, self._sample_again)
        except EngineError:
            if self.is_in_train:
                self._save_last_step()
            raise
        self.batch = first.batch
        self._log_batch(first, filled)
        self._log_metrics(self.algorithm.observe(first.batch, first.scored) or {})
        return filled.output

    def _sample(self, inputs: list[dict[str, Any]], attempt: int = 0) -> Round:
        self.reward_parts = RewardParts(self, super()._calculate_rewards, inputs)
        self.batch = replace(self.algorithm.plan(inputs, self.processes.index * len(inputs)), attempt=attempt)
        output = super()._generate_and_score_completions(inputs)
        scored = self._scored(output)
        credit = self.algorithm.credit(self.batch, scored)
        output["advantages"] = credit.advantages
        output["mentor_source"] = self.batch.source_B.to(output["completion_ids"].device)
        leave_out(output, self.batch, self.processes)
        replace_last(self._logs["advantages"], credit.advantages_N.tolist())
        return Round(inputs, output, self.batch, scored, credit)

    def _sample_again(self, inputs: list[dict[str, Any]], attempt: int) -> tuple[Round, dict[str, Any]]:
        table = self._logs = new_logs()
        with aside(self._metrics["train"], self.algorithm):
            part = self._sample(inputs, attempt)
        self._logs = self.logs_by_mode["train"]
        return part, table

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        given = prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        generate = partial(super()._generate_single_turn, *given)
        if self._mode == "eval":
            return generate()
        forward = TokenPass(self._forward, self._tokenizer.pad_token_id, self.args.per_device_train_batch_size)
        entropies, profile = partial(policy_entropies, forward, self.processes), partial(profiling_context, self)
        progress = partial(SamplingProgress, disable=self.args.disable_tqdm or not self.is_world_process_zero())
        ways = generate, self.engine.session, entropies, profile, self.eos_token_ids, progress, self.reward_parts.first
        self.batch = self.algorithm.rollout(prompt_ids, self.batch, Rollouts(*ways))
        return self.batch.completion_ids, self.batch.engine_logps

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._mode == "eval":
            self._log_completion_extra("source", ["eval"] * len(prompts))
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards_N_F = self.reward_parts.all(inputs, prompts, completions, completion_ids_list)
        self._log_completion_extra("source", self.batch.source_names())
        warn_of_undefined(rewards_N_F, self.reward_func_names)
        self.batch = replace(self.batch, completion_ids=completion_ids_list, rewards_N_F=rewards_N_F)
        return rewards_N_F

    def _scored(self, output: dict[str, Any]) -> Scored:
        mask, logps = output["completion_mask"].bool(), output.get("old_per_token_logps")
        if logps is None and self.algorithm.needs_policy_logps:
            logps = policy_logps(self._forward, output, self.args.per_device_train_batch_size)
        self.batch = self.batch.completed(logps, mask)
        return Scored(
            rewards_N=self.reward_parts.weighted(self.batch.rewards_N_F),
            source_N=self.processes.gather(self.batch.source_B),
            local=self.processes.local(len(mask)),
            advantages_B=output["advantages"],
            mask_B_T=mask,
            policy_logps_B_T=logps,
        )

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._loss_pass is not None:
            self._loss_pass.done(*result[:2])
        return result

    def _compute_loss(self, model, inputs):
        # A copy, as rollouts are used again by later steps
        term = self.algorithm.loss_term if self.algorithm.needs_states else None
        self._loss_pass = loss_pass = LossPass(dict(inputs), self.algorithm.reweigh, term)
        scale = self.args, self.accelerator, getattr(self, "current_gradient_accumulation_steps", 1)
        try:
            loss = loss_pass.loss(super()._compute_loss, model, *scale)
        finally:
            self._loss_pass = None
        if self._mode == "train":
            self._log_metrics(loss_pass.metrics(self.algorithm.sources, self.processes.reduce))
        return loss

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _log_batch(self, first: Round, filled: Filled) -> None:
        """Metrics of the rows by source, and the records of tokens."""
        credit, names = first.credit, self.reward_func_names
        self._log_metrics(credit.metrics)
        if credit.no_spread is not None:
            self._metrics["train"]["frac_reward_zero_std"][-1] = credit.no_spread
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        metrics = batch_metrics(first.batch, first.scored, credit.advantages_N, names, ends, self.processes)
        self._log_metrics(metrics | filled.metrics)
        if self.accelerator.is_main_process:
            given = self.args, self.state.global_step + 1, self._tokenizer
            filled.save_records(*given)
            self.examples = filled.examples(*given)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._logs = self.logs_by_mode[self._mode]
        if self._mode == "train":
            super().log(logs, start_time)
            examples, self.examples = self.examples, []
            return show(*map(excerpt, examples))
        with evaluation_log(self, logs) as writes:
            super().log(logs, start_time)
        if writes:
            show(*evaluation_excerpts(self._logs, printed(self.args), self.state.global_step))
        self.logs_by_mode["eval"] = new_logs()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, results=None):
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            names = {"base": self.model.config._name_or_path, "expert": self.engine.expert_name}
            rewards = list(zip(self.reward_func_names, self.reward_weights.tolist()))
            facts = names | {"rewards": rewards, "recipe": self.recipe, "training": self.is_in_train}
            facts["chats"] = self._tokenizer.chat_template is not None
            complete_card(self.args, self.state, **facts, dataset_name=dataset_name, results=results)

    def push_to_hub(self, *args, **kwargs):
        with model_files_only(self.args):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        with model_files_only(self.args):
            super()._push_from_checkpoint(checkpoint_folder)

    # Checkpoints

    def _run_state(self) -> dict[str, Any]:
        """What a run needs, beyond TRL's own checkpoint, to go on to the same numbers."""
        return {
            "algorithm": self.algorithm.state_dict(),
            "drawn": self.resampling.drawn,
            "step": self._step,
            "epochs": int((self.state.epoch or 0) + 1e-6),
            "tokens": self.state.num_input_tokens_seen,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "logs": copy_logs(self.logs_by_mode["train"]) if self.log_completions else None,
            "buffered_inputs": self._buffered_inputs,
        }

    def _set_run_state(self, state: dict[str, Any]) -> None:
        self.algorithm.load_state_dict(state["algorithm"])
        self.resampling.drawn = state.get("drawn", 0)
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        self._metrics["train"] = defaultdict(list, state["metrics"])
        if state["logs"] is not None and self.log_completions:
            restore_logs(self.logs_by_mode["train"], state["logs"])

    def _save_last_step(self) -> None:
        """Save a checkpoint of the last finished optimizer step, for a run that is about to end with an error."""
        step = self.state.global_step
        if step == 0:
            return
        if self._mode == "train" and self.run_callback.state is not None:
            self._set_run_state(self.run_callback.state)
            self.state.num_input_tokens_seen = self.run_callback.state["tokens"]
            self.run_callback.restore_rng()
        self._save_checkpoint(self.model, trial=None)
        folder = os.path.join(self._get_output_dir(trial=None), f"checkpoint-{step}")
        warnings.warn(f"The run ends here. {resume_advice(folder, self.args.save_only_model)}", stacklevel=2)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        check_one_batch(self.train_dataset, self.args.generation_batch_size, self.num_generations)
        fit_tokenizer(self.accelerator.unwrap_model(self.model), self._tokenizer)
        checkpoint = usable_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self.recipe is None:
            expert = None if self.engine.remote else self.engine.expert_name
            self.recipe = script_recipe(self.args, self.model, expert, self.reward_funcs)
        if self.is_world_process_zero():
            save_recipe(self.recipe, self.args.output_dir)
        result = super().train(checkpoint, *args, **kwargs)
        if self.args.save_strategy != "no":
            self.save_model(self.args.output_dir, _internal_call=True)  # `push_to_hub` is asked for, or not
        return result

    # Not `_save_checkpoint`, which pushes the folder to the Hub before it returns
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._run_state()
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            state["buffered_inputs"] = None
        save_state(output_dir, state, self.processes.index, self.processes.count)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        warn_of_missing(checkpoint, self.processes.index, self.processes.count)
        state = load_state(checkpoint, self.processes.index, self.processes.count, self.processes.device)
        if state is not None:
            self._set_run_state(state)
            self.run_callback.epochs_to_skip = state["epochs"]
            check_expert_kept(self.engine.released and not self.algorithm.over, checkpoint)
