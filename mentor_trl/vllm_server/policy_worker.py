"""What the workers of an engine that holds a policy answer to `collective_rpc`. Changes nothing of vLLM."""

import os
import uuid
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .identity import distrust, files_digest, weights_digest
from .options import CONFIG_KEY, INCOMPLETE, INITIAL, model_shape


class PolicyWorkerExtension:
    """
    Mixed into vLLM's worker class. All methods take and return what JSON can carry; a mistake of the caller is
    returned as `"error"`. There is one such class for all engines: vLLM changes the worker class of its process, which
    takes no second one of the same methods. What an engine that holds the expert as well has of its own is its
    [`~mentor_trl.vllm_plugin.runner.MixedRunner`].
    """

    _weights_version = INITIAL
    _instance = uuid.uuid4().hex  # of this process: one that is started anew has another

    @property
    def _mentor(self):
        """The mixed runner; `None` in an engine that holds the policy alone."""
        return getattr(self.model_runner, "mentor", None)

    def _policy(self) -> tuple[torch.nn.Module, Any]:
        """Model and model config of the policy."""
        if self._mentor is not None:
            return self._mentor.policy()
        return self.model_runner.get_model(), self.vllm_config.model_config

    @cached_property
    def _loaded(self) -> dict:
        """Digests of what was loaded at the start; taken before anything changes."""
        digests = {"policy_digest": self.mentor_digest("policy")}
        if self._mentor is not None:
            digests["expert_digest"] = self.mentor_digest("expert")
            digests["expert_files"] = files_digest(self.vllm_config.model_config.model)
        return digests

    def mentor_info(self) -> dict | None:
        """What this engine is, from its first worker."""
        mentor, additional = self._mentor, self.vllm_config.additional_config
        if mentor is None and isinstance(additional, dict) and CONFIG_KEY in additional:
            return {"error": "this engine was asked for mixed rollouts, and does not sample them"}
        if not is_first():
            return None
        import vllm

        _, policy = self._policy()
        return {
            "kind": "policy",
            "mentor_trl": __version__,
            "vllm": vllm.__version__,
            "policy": policy.model,
            "policy_shape": model_shape(policy.hf_text_config),
            "dtype": str(policy.dtype).removeprefix("torch."),
            "max_model_len": self.vllm_config.model_config.max_model_len,
            "weights_version": self._weights_version,
            "instance": self._instance,
            **self._loaded,
            **(self._branching() if mentor is None else mentor.info()),
        }

    def _branching(self) -> dict:
        """Whether requests end at branch points, and by which tokens."""
        table = getattr(self._processor(), "table", None)
        if table is None:
            return {"branches": False}
        tokens = {"num_tokens": table.num_tokens, "branch_id": table.branch_id, "sentences_digest": table.digest}
        return {"branches": True, **tokens}

    def mentor_take_records(self, keys: list[str]) -> dict | None:
        """Records of rows, see [`~mentor_trl.vllm_plugin.records.RecordStore.take`], from the first worker."""
        if self._mentor is None:
            return {"error": "this engine holds the policy alone, and keeps no records"}
        rows = self._mentor.records.take(keys)
        return {"rows": rows, "weights_version": self._weights_version} if is_first() else None

    def _processor(self) -> Any:
        """The processor that ends requests at branch points; `None` where the engine was started without."""
        runner = self.model_runner
        processors = getattr(getattr(runner, "input_batch", None), "logitsprocs", None)
        found = getattr(processors, "all", None) or getattr(getattr(runner, "sampler", None), "logits_processors", ())
        return next((processor for processor in found if type(processor).__name__ == "BranchingProcessor"), None)

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

    def mentor_digest(self, model: str = "policy") -> str:
        """Digest of this worker's share of the `"policy"` or the `"expert"`."""
        return weights_digest(self._policy()[0] if model == "policy" else self.model_runner.get_model())


def is_first() -> bool:
    """Whether this is the worker that answers. Ranks of the process do not tell: a trainer counts its own."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0
