"""
What the workers of a mixed-policy engine answer to `collective_rpc`. Importing this module hooks the worker's process,
so that an engine which names the extension has the plugin wherever its workers run.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from ..vllm_server.identity import distrust, files_digest, weights_digest
from ..vllm_server.options import INCOMPLETE, model_shape
from .hooks import asked_for, install_worker


install_worker()


class MentorWorkerExtension:
    """
    Mixed into vLLM's worker class. All methods take and return what JSON can carry; a mistake of the caller is
    returned as `"error"`. An engine that holds the policy alone has them as well.
    """

    _weights_version = "initial"

    @property
    def _mentor(self):
        """The mixed runner; `None` in an engine that holds the policy alone."""
        return getattr(self.model_runner, "mentor", None)

    def _policy(self) -> tuple[torch.nn.Module, Any]:
        """Model and model config of the policy."""
        runner = self.model_runner
        if self._mentor is None:
            return runner.get_model(), self.vllm_config.model_config
        return runner.get_draft_model(), runner.speculative_config.draft_model_config

    @cached_property
    def _loaded(self) -> dict:
        """Digests of the models as they were loaded; taken before anything changes."""
        digests = {"policy_digest": self.mentor_digest("policy")}
        if self._mentor is not None:
            digests["expert_digest"] = self.mentor_digest("expert")
            digests["expert_files"] = files_digest(self.vllm_config.model_config.model)
        return digests

    def mentor_info(self) -> dict | None:
        """What this engine is, from its first worker."""
        import vllm

        mentor, config = self._mentor, self.vllm_config
        if mentor is None and asked_for(config):
            return {"error": "this engine was asked for mixed rollouts, and does not sample them"}
        if not _is_first():
            return None
        _, policy = self._policy()
        info = {
            "kind": "policy" if mentor is None else "mixed",
            "mentor_trl": __version__,
            "vllm": vllm.__version__,
            "policy": policy.model,
            "policy_shape": model_shape(policy.hf_text_config),
            "dtype": str(policy.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "weights_version": self._weights_version,
            **self._loaded,
        }
        if mentor is None:
            return info
        return info | {
            "expert": config.model_config.model,
            "expert_stop_ids": _stop_ids(config.model_config),
            "vocab_sizes": mentor.vocab_sizes,
            "num_tokens": mentor.num_tokens,
            "draft_length": self.model_runner.num_spec_tokens,
            "counts": dict(mentor.counts),
        }

    def mentor_take_records(self, keys: list[str]) -> dict | None:
        """Records of rows, see [`~mentor_trl.vllm_plugin.records.RecordStore.take`], from the first worker."""
        rows = self._mentor.records.take(keys)
        return {"rows": rows, "weights_version": self._weights_version} if _is_first() else None

    def mentor_name_weights(self, version: str) -> dict:
        """Set what `mentor_info` calls the policy's weights, around a transfer that vLLM itself makes."""
        _ = self._loaded
        self._weights_version = version
        return {"weights_version": version}

    def mentor_load_policy(self, folder: str, version: str) -> dict:
        """Load the policy's weights from the safetensors files of a folder, complete by now, that all workers see."""
        from safetensors import safe_open

        # Told rather than raised, since an error that a worker raises loses its text on the way
        missing = f"the server sees no *.safetensors in {str(folder)!r}: both sides need one shared folder"
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            return {"error": f"{missing} ({error.strerror})"}
        try:
            # Through the descriptor, so that what is checked is what is read
            files = sorted(Path(f"/proc/self/fd/{descriptor}").glob("*.safetensors"))
            if not files:
                return {"error": missing}
            for name, status in [(folder, os.fstat(descriptor)), *((file.name, file.stat()) for file in files)]:
                reason = distrust(status)
                if reason is not None:
                    return {"error": f"{name!r} in {folder!r} {reason}: the server loads only what its own user wrote"}

            def tensors():
                for file in files:
                    with safe_open(file, framework="pt") as opened:
                        for name in opened.keys():
                            yield name, opened.get_tensor(name)

            return self.mentor_load_tensors(tensors(), version)
        finally:
            os.close(descriptor)

    def mentor_load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], version: str) -> dict:
        """Load the policy's weights from the caller's memory; for an engine in the caller's process."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import layerwise

        model, config = self._policy()
        _ = self._loaded
        # Until all is loaded the policy is neither the old nor the new one, and says so
        self._weights_version = INCOMPLETE
        with set_current_vllm_config(self.vllm_config):
            layerwise.initialize_layerwise_reload(model)
            model.load_weights(tensors)
            layerwise.finalize_layerwise_reload(model, config)
        self._weights_version = version
        return {"weights_version": version}

    def mentor_digest(self, model: str) -> str:
        """Digest of this worker's share of the `"policy"` or the `"expert"`."""
        return weights_digest(self._policy()[0] if model == "policy" else self.model_runner.get_model())


def _is_first() -> bool:
    """Whether this is the worker that answers. Ranks of the process do not tell: a trainer counts its own."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def _stop_ids(config) -> list[int]:
    """Ids with which a model ends a completion, by its generation config and its config."""
    generation = config.try_get_generation_config()
    found = []
    for value in (generation.get("eos_token_id"), getattr(config.hf_text_config, "eos_token_id", None)):
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [index for index in values if index is not None and index not in found]
    return found
