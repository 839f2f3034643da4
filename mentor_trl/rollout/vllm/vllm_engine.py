"""The vLLM engine of a trainer."""

import warnings
from contextlib import AbstractContextManager

from ...config import MentorGRPOConfig
from ...config_checks import LOADING_OPTIONS
from ...errors import SetupError
from ...experts.compatibility import check_stop_ids
from ...experts.load import check_expert_given, check_expert_source, is_adapter
from ..host import Host, check_vllm
from ..serving.generation import backend
from ..serving.served_engine import ServedEngine
from .backend import MixedVLLMGeneration


_PLAIN = "or set `num_mixed_generations=0` for plain GRPO"


class VLLMSetup:
    """[`~mentor_trl.rollout.host.EngineSetup`] of an engine that holds policy and expert."""

    def __init__(self, args: MentorGRPOConfig, expert, expert_tokenizer):
        self.args, self.given, self.tokenizer = args, expert, expert_tokenizer
        self.source = expert if expert is not None else args.expert_model_name_or_path

    def check(self, model, quantization_config) -> None:
        args = self.args
        check_expert_given(args, self.given)
        self._check_expert()
        if quantization_config is not None or getattr(model, "is_quantized", False):
            raise SetupError(
                "A quantized policy cannot be handed to the vLLM engine of mixed rollouts. Train in bfloat16 with "
                f"LoRA, set `use_vllm=False`, {_PLAIN}."
            )
        if args.vllm_structured_outputs_regex is not None:
            raise SetupError(
                f"`vllm_structured_outputs_regex` is not supported with mixed rollouts. Unset it, {_PLAIN}."
            )
        if args.vllm_mode == "server":
            self._warn_of_timeouts()
            if args.vllm_weight_sync != "folder" and args.device.type == "cuda":
                check_vllm()  # TRL's client of NCCL
        else:
            self._check_colocate()

    def _check_expert(self) -> None:
        if self.source is not None and not isinstance(self.source, str):
            raise SetupError(
                f"The expert is a {type(self.source).__name__}, and vLLM loads models by name. Pass the expert's id "
                "or folder (`save_pretrained` it first), or set `use_vllm=False`."
            )
        for name in LOADING_OPTIONS:
            if getattr(self.args, name) != getattr(MentorGRPOConfig, name):
                raise SetupError(
                    f"`{name}={getattr(self.args, name)!r}` applies to an expert that this process loads, and with "
                    "`use_vllm` vLLM does. Unset it; `mentor-trl serve` takes vLLM's own options, such as --dtype."
                )

    def _warn_of_timeouts(self) -> None:
        args = self.args
        needed = args.vllm_read_timeout + args.vllm_server_timeout
        if args.world_size > 1 and args.ddp_timeout <= needed:
            warnings.warn(
                f"`ddp_timeout={args.ddp_timeout}` seconds are not above `vllm_read_timeout` and "
                f"`vllm_server_timeout` together ({needed:.0f}): if the server fails, the processes that wait may end "
                "before the main one has recovered, or saved a checkpoint. Raise `ddp_timeout`.",
                stacklevel=5,
            )

    def _check_colocate(self) -> None:
        args = self.args
        if args.vllm_policy_server_base_url is not None:
            raise SetupError(
                f"`vllm_policy_server_base_url={args.vllm_policy_server_base_url!r}` needs `vllm_mode='server'`. Set "
                "that, or unset the address."
            )
        if args.vllm_tensor_parallel_size > 1:
            raise SetupError(
                f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` is not supported with mixed rollouts "
                "in colocate mode. Set it to 1, or start `mentor-trl serve --tensor-parallel-size` and set "
                "`vllm_mode='server'`."
            )
        check_vllm("vllm-shared")
        if is_adapter(self.source, None):
            raise SetupError(
                f"The expert {self.source!r} is a PEFT adapter, which vLLM cannot load as a model of its own. Merge "
                "it (`merge_and_unload`), save it, and name that folder."
            )
        # A server's expert may lie on the server's disk alone
        check_expert_source(self.source, args.expert_model_revision, args.trust_remote_code)

    def building(self) -> AbstractContextManager:
        """Inside, TRL's backend is ours."""
        return backend(MixedVLLMGeneration, config=self.args, expert=self.source)

    def build(self, host: Host) -> ServedEngine:
        """Check that the engine, which is running by now, fits the policy."""
        generation = host.vllm_generation
        generation.check(host.policy, self.tokenizer, host.longest_prompt())
        stop = check_stop_ids(
            host.stop_token_ids, generation.info["expert_stop_ids"], host.tokenizer, host.args.extend_stop_tokens
        )
        return ServedEngine(generation, host.sync_weights, stop, generation.info["expert"])
