"""TRL's vLLM backend for engines of the policy alone."""

from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ...errors import SetupError
from ...experts.compatibility import check_context, text_model
from ...vllm_server.options import TOKENS
from ...vllm_server.token_table import TokenTable
from ..serving.adapters import check_adapter
from ..serving.generation import PolicyGeneration
from ..serving.policy_server import PolicyServer
from ..types import MixedRequest
from .policy_llm import PolicyLLM
from .replicas import PolicyReplicas
from .stock_sampler import StockSampler, check_branching


# Those that vLLM makes room for
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class StockGeneration(PolicyGeneration):
    """
    [`~mentor_trl.rollout.serving.generation.PolicyGeneration`] with stock engines, whose sampler is given the expert
    later.
    """

    policy: PolicyReplicas | PolicyLLM | None = None

    @property
    def servers(self) -> list[PolicyServer]:
        return self.policy.servers

    def _connect(self) -> dict[str, Any]:
        self.policy = PolicyReplicas(self.url, num_tokens=self.num_tokens, **self.access)
        self.sampler = StockSampler(self.policy)
        return self.policy.info

    def _build(self) -> dict[str, Any]:
        options = self.engine_options
        if self.weight_sync == "adapter":
            check_adapter(self.model)
            rank = next(size for size in LORA_RANKS if size >= self.model.active_peft_config.r)
            options |= {"enable_lora": True, "max_lora_rank": rank}
        if getattr(text_model(self.model), "is_quantized", False):
            options["quantization"] = "bitsandbytes"  # of the base, as TRL's options quantize it
        config = text_model(self.model).config.get_text_config()
        table = TokenTable.of(self.tokenizer, config.vocab_size, _stop_ids(self.model))
        self.policy = PolicyLLM(self.model.name_or_path, additional_config={TOKENS: asdict(table)}, **options)
        check_branching(self.policy, self.policy.run, table.num_tokens, "The engine of the policy")
        self.sampler = StockSampler(self.policy)
        return self.policy.info

    def _session(self, request: MixedRequest) -> AbstractContextManager[Any]:
        return self.sampler.session()

    def _load_tensors(self, version: str) -> None:
        self.policy.load_tensors(self._iter_named_params(), version)

    @property
    def _adapter_hosts(self) -> list:
        return self.servers if self.mode == "server" else [self.policy]

    def check(self, policy: PreTrainedModel, sentence_ids: tuple[int, ...], longest_prompt: int) -> None:
        """Raise [`SetupError`] if the engines, which are running by now, do not fit this policy."""
        where, option = "The engine", "`vllm_max_model_length`"
        if self.mode == "server":
            where, option = "The server", "--max-model-len of `mentor-trl serve`"
        self.check_shape(policy, self.info, where)
        if self.weight_sync == "adapter":
            check_adapter(policy)
        if sentence_ids and self.mode == "server":
            self._on_main(lambda: self.policy.check_sentences(sentence_ids))
        limit = self.info["max_model_len"]
        check_context([longest_prompt], self.max_completion_length, limit, "the engine's", f"raise {option}")
        if self.info["num_tokens"] != self.num_tokens:
            raise SetupError(
                f"{where} samples {self.info['num_tokens']} token ids, and the policy's tokenizer defines "
                f"{self.num_tokens}. Serve the policy with its own tokenizer."
            )


def _stop_ids(model) -> list[int]:
    """Ids with which a model ends a completion, by its configurations."""
    base = text_model(model)
    found: list[int] = []
    generation = base.generation_config.eos_token_id if base.generation_config is not None else None
    for value in (generation, base.config.get_text_config().eos_token_id):
        found += value if isinstance(value, (list, tuple)) else [value]
    return [index for index in found if index is not None]
