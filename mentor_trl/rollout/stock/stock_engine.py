"""The engine of a trainer whose policy is sampled by stock vLLM, and whose expert is on servers of its own."""

from contextlib import AbstractContextManager

from ...config import MentorGRPOConfig
from ...errors import SetupError
from ...experts.load import check_expert_given
from ...objective import sentence_endings
from ..host import Host, check_vllm
from ..serving.expert_servers import remote_expert
from ..serving.generation import backend
from ..serving.served_engine import ServedEngine
from .stock_backend import StockGeneration


class StockSetup:
    """[`~mentor_trl.rollout.host.EngineSetup`] of stock engines of the policy, and an expert on servers."""

    def __init__(self, args: MentorGRPOConfig, expert, expert_tokenizer):
        self.args, self.given = args, expert

    def check(self, model, quantization_config) -> None:
        args = self.args
        check_expert_given(args, self.given)
        quantized = quantization_config is not None or getattr(model, "is_quantized", False)
        if quantized and args.vllm_weight_sync != "adapter":
            raise SetupError(
                f"`vllm_weight_sync={args.vllm_weight_sync!r}` cannot hand the weights of a quantized policy to vLLM. "
                "Train a LoRA adapter (`use_peft`) and set it to 'adapter', or set `use_vllm=False`."
            )
        if args.vllm_structured_outputs_regex is not None:
            raise SetupError(
                "`vllm_structured_outputs_regex` is not supported with mixed rollouts. Unset it, or set "
                "`num_mixed_generations=0` for plain GRPO."
            )
        if args.vllm_mode == "colocate" or args.device.type == "cuda":
            check_vllm()
        if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size > 1:
            raise SetupError(
                f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` is not supported with mixed rollouts "
                "in colocate mode. Set it to 1, or start `mentor-trl serve --tensor-parallel-size` and set "
                "`vllm_mode='server'`."
            )

    def building(self) -> AbstractContextManager:
        """Inside, TRL's backend is ours."""
        return backend(StockGeneration, config=self.args)

    def build(self, host: Host) -> ServedEngine:
        """Check that engines and expert fit the policy; all are running by now."""
        generation, args = host.vllm_generation, host.args
        endings = tuple(sentence_endings(host.tokenizer)) if args.branch_rule == "sentence" else ()
        generation.check(host.policy, endings, host.longest_prompt())
        expert, stop = remote_expert(args, host)
        if generation.sampler is not None:
            generation.sampler.expert = expert
        return ServedEngine(generation, host.sync_weights, stop, expert.name, expert)
