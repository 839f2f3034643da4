"""
What the workers of a mixed-policy engine answer to `collective_rpc`. Importing this module hooks the worker's process,
so that an engine which names the extension has the plugin wherever its workers run.
"""

from functools import cached_property
from typing import Any

import torch

from ..vllm_server.identity import files_digest, weights_digest
from ..vllm_server.policy_worker import PolicyWorkerExtension, is_first
from ..vllm_server.token_table import engine_stop_ids
from .hooks import asked_for, install_worker


install_worker()


class MentorWorkerExtension(PolicyWorkerExtension):
    """Mixed into vLLM's worker class, see [`PolicyWorkerExtension`]."""

    @property
    def _mentor(self):
        """The mixed runner; `None` in an engine that is not one."""
        return getattr(self.model_runner, "mentor", None)

    def _policy(self) -> tuple[torch.nn.Module, Any]:
        if self._mentor is None:
            return super()._policy()
        return self.model_runner.get_draft_model(), self.model_runner.speculative_config.draft_model_config

    @cached_property
    def _loaded(self) -> dict:
        digests = {"policy_digest": self.mentor_digest("policy")}
        if self._mentor is not None:
            digests["expert_digest"] = self.mentor_digest("expert")
            digests["expert_files"] = files_digest(self.vllm_config.model_config.model)
        return digests

    def mentor_info(self) -> dict | None:
        mentor, config = self._mentor, self.vllm_config
        if mentor is None and asked_for(config):
            return {"error": "this engine was asked for mixed rollouts, and does not sample them"}
        info = super().mentor_info()
        if info is None or mentor is None:
            return info
        return info | {
            "kind": "mixed",
            "expert": config.model_config.model,
            "expert_stop_ids": engine_stop_ids(config.model_config),
            "vocab_sizes": mentor.vocab_sizes,
            "num_tokens": mentor.num_tokens,
            "draft_length": self.model_runner.num_spec_tokens,
            "counts": dict(mentor.counts),
        }

    def mentor_take_records(self, keys: list[str]) -> dict | None:
        """Records of rows, see [`~mentor_trl.vllm_plugin.records.RecordStore.take`], from the first worker."""
        rows = self._mentor.records.take(keys)
        return {"rows": rows, "weights_version": self._weights_version} if is_first() else None

    def mentor_digest(self, model: str = "policy") -> str:
        """Digest of this worker's share of the `"policy"` or the `"expert"`."""
        return weights_digest(self._policy()[0] if model == "policy" else self.model_runner.get_model())
