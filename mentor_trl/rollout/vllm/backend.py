"""TRL's vLLM backend for an engine that speaks for policy and expert."""

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import SetupError
from ...experts.compatibility import check_context, check_tokenizers
from ...experts.load import load_expert_tokenizer
from ...objective import sentence_endings
from ...vllm_server.identity import files_digest
from ...vllm_server.token_table import TokenTable
from ..serving.generation import PolicyGeneration
from ..serving.nccl import DraftWeightClient, PolicyWeightClient
from ..serving.policy_server import PolicyServer
from ..types import MixedRequest
from .colocate import ColocateSampler
from .server import PolicyServerSampler, ServerSampler


class MixedVLLMGeneration(PolicyGeneration):
    """
    [`~mentor_trl.rollout.serving.generation.PolicyGeneration`] with engines that also hold the expert. Its weights are
    those of the draft model: nothing that happens here changes the expert.
    """

    def __init__(self, *args: Any, expert: str | None, **kwargs: Any):
        self.expert = expert
        self.policy_sampler: PolicyServer | None = None
        super().__init__(*args, **kwargs)

    @property
    def servers(self) -> list[PolicyServer]:
        return [self.sampler] if self.policy_sampler is None else [self.sampler, self.policy_sampler]

    def _connect(self) -> dict[str, Any]:
        self.sampler = ServerSampler(self.url, num_tokens=self.num_tokens, **self.access)
        if self.config.vllm_policy_server_base_url is not None:
            self.policy_sampler = PolicyServerSampler(self.config.vllm_policy_server_base_url, **self.access)
        return {**self.sampler.info, "policy_server": getattr(self.policy_sampler, "info", None)}

    def _build(self) -> dict[str, Any]:
        self.sampler = ColocateSampler(
            self.model.name_or_path,
            self.expert,
            num_tokens=self.num_tokens,
            draft_length=self.config.draft_length,
            sentence_ids=sentence_endings(self.tokenizer) if self.config.branch_rule == "sentence" else None,
            **self.engine_options,
        )
        return self.sampler.info

    def _session(self, request: MixedRequest) -> AbstractContextManager[Any]:
        plain = self.policy_sampler is not None and request.plain
        return (self.policy_sampler if plain else self.sampler).session()

    def _nccl_client(self, index: int) -> type[PolicyWeightClient]:
        return DraftWeightClient if index == 0 else PolicyWeightClient

    def check(
        self, policy: PreTrainedModel, expert_tokenizer: PreTrainedTokenizerBase | None, longest_prompt: int
    ) -> None:
        """Raise [`SetupError`] if the engine, which is running by now, does not fit this policy and expert."""
        expert = self.expert
        info, where = self.info, "The server" if self.mode == "server" else "The engine"
        for name, served in ((where, info), ("The policy's server", info.get("policy_server"))):
            if served is not None:
                self.check_shape(policy, served, name)
        if expert is not None and not same_model(expert, info["expert"], info.get("expert_files")):
            raise SetupError(
                f"{where} speaks for the expert {info['expert']!r}, and the configuration names {expert!r}. Serve "
                "that expert, or leave `expert_model_name_or_path` unset to take the server's."
            )
        if self.mode == "colocate" and expert_tokenizer is None:
            expert_tokenizer = load_expert_tokenizer(expert, None, self.trust_remote_code)
        if expert_tokenizer is not None:
            check_tokenizers(self.processing_class, expert_tokenizer)
        if self.config.branch_rule == "sentence":
            ours = TokenTable(0, 0, tuple(sentence_endings(self.tokenizer))).digest
            if info.get("sentences_digest") != ours:
                raise SetupError(
                    f"{where} has another table of sentence ends (digest {info.get('sentences_digest')}, and here "
                    f"{ours}): its tokenizer is not the policy's. Serve with `--tokenizer {policy.name_or_path}`."
                )
        option = "--max-model-len of `mentor-trl serve`" if self.mode == "server" else "`vllm_max_model_length`"
        limit = min(served["max_model_len"] for served in (info, info.get("policy_server")) if served is not None)
        check_context([longest_prompt], self.max_completion_length, limit, "the engine's", f"raise {option}")


# Last parts of paths that every run has
COMMON_NAME = re.compile(
    r"((global[-_]?)?step|checkpoint|epoch|iter)[-_]?\d+|best|final|hf|last|latest|merged|model|output"
)


def same_model(name: str, served: str, served_files: str | None = None) -> bool:
    """
    Whether two names may mean one model. A folder that is here is compared by its weights, as `files_digest` of the
    server's, where the server has told that. Else two ids of the Hub are one model only if they are equal, and paths,
    as a folder may lie elsewhere on a server, if their last parts are: with the parts before where the last says
    nothing. A snapshot in the Hub's cache counts as its id.

    >>> same_model("org/expert", "org/expert"), same_model("org/expert", "other/expert")
    (True, False)
    >>> same_model("experts/mine", "/data/experts/mine"), same_model("experts/mine", "/data/experts/yours")
    (True, False)
    >>> same_model("mine/checkpoint-100", "/data/mine/checkpoint-100"), same_model("mine/final", "/data/yours/final")
    (True, False)
    >>> same_model("org/expert", "/cache/models--org--expert/snapshots/0a1b")
    True
    """
    files = files_digest(name) if served_files is not None else None
    if files is not None:
        return files == served_files
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$", served)
    served = "/".join(cached.groups()) if cached else served
    if all(value.count("/") == 1 and not value.startswith((".", "~", "/")) for value in (name, served)):
        return name == served
    mine, theirs = (Path(os.path.abspath(value)).parts for value in (name, served))
    parts = 2 if COMMON_NAME.fullmatch(mine[-1]) else 1
    return mine[-parts:] == theirs[-parts:]
