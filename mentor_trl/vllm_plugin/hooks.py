"""
Where the plugin enters vLLM. Every replaced function first asks whether its own engine wants mixed rollouts, and is
vLLM's where it does not.
"""

import functools
from contextvars import ContextVar
from pkgutil import resolve_name
from typing import Any

from ..vllm_server.options import CONFIG_KEY
from . import compat
from .requests import check_params
from .shared_options import WORKER_EXTENSION, engine_options


_vocabularies_may_differ: ContextVar[bool] = ContextVar("vocabularies_may_differ", default=False)
_installed: set[str] = set()
DRAFTS = {"method": "draft_model", "draft_sample_method": "probabilistic", "rejection_sample_method": "standard"}


def asked_for(vllm_config) -> bool:
    """Whether an engine, by its configuration or arguments, is to sample from the mixed policy."""
    config = getattr(vllm_config, "additional_config", None)
    return isinstance(config, dict) and CONFIG_KEY in config


def check_config(vllm_config) -> None:
    """
    Check the whole configuration of a mixed-policy engine. A `ValueError` lists every setting under which it would not
    sample exactly, and the fix.
    """
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    found: dict[str, tuple[Any, Any]] = {
        **{f"speculative_config.{name}": (getattr(speculative, name, None), right) for name, right in DRAFTS.items()},
        "async_scheduling": (bool(vllm_config.scheduler_config.async_scheduling), False),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "data_parallel_size": (parallel.data_parallel_size, 1),
        "worker_extension_cls": (parallel.worker_extension_cls, WORKER_EXTENSION),
        "V2 model runner (VLLM_USE_V2_MODEL_RUNNER)": (vllm_config.use_v2_model_runner, False),
        "multimodal": (vllm_config.model_config.supports_multimodal_inputs, False),
    }
    wrong = [f"{name} is {value!r} and must be {right!r}" for name, (value, right) in found.items() if value != right]
    models = {"expert": vllm_config.model_config, "policy": getattr(speculative, "draft_model_config", None)}
    for name, model in models.items():
        # The policy reads some tokens twice, which a recurrent state does not survive
        if model is not None and (model.is_hybrid or model.is_attention_free):
            wrong.append(f"the {name} has recurrent layers")
    policy, expert = models["policy"], models["expert"]
    if policy is not None and policy.max_model_len < expert.max_model_len:
        wrong.append(
            f"max_model_len is {expert.max_model_len} and the policy's context {policy.max_model_len}; lower "
            "max_model_len to it"
        )
    if wrong:
        options = {name: value for name, value in engine_options("POLICY", "EXPERT").items() if name != "model"}
        raise ValueError(
            f"This engine asks for mixed rollouts and cannot sample them: {'; '.join(wrong)}. Start it with "
            f"`mentor-trl serve`, or with VLLM_USE_V2_MODEL_RUNNER=0 and the engine arguments {options}."
        )


def install() -> None:
    """Hook the front end of vLLM: configuration and requests. May be called any number of times."""
    if "front" in _installed:
        return
    try:
        compat.check_version()
        compat.check_symbols()
    except compat.IncompatibleVLLM as error:
        # Other engines on this vLLM are none of our business: only one that asks for mixed rollouts fails
        _wrap("vllm.engine.arg_utils:EngineArgs.create_engine_config", functools.partial(_refuse, error))
        return
    _installed.add("front")
    _wrap("vllm.engine.arg_utils:EngineArgs.create_engine_config", _create_engine_config)
    _wrap("vllm.config.speculative:SpeculativeConfig.verify_equal_vocab_size_if_draft_model", _verify_vocabularies)
    _wrap("vllm.v1.engine.input_processor:InputProcessor._validate_params", _validate_params)


def install_worker() -> None:
    """Hook the workers of an engine that asks for mixed rollouts. May be called any number of times."""
    install()
    if "worker" in _installed:
        return
    compat.check_version()
    compat.check_symbols(compat.WORKER_SYMBOLS)
    _installed.add("worker")
    _wrap("vllm.v1.worker.gpu_model_runner:GPUModelRunner.__init__", _make_runner)
    _wrap("vllm.v1.spec_decode.draft_model:DraftModelProposer._raise_if_vocab_size_mismatch", _raise_if_mismatch)


def _wrap(method: str, wrapper) -> None:
    owner, _, name = method.rpartition(".")
    owner = resolve_name(owner)
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(self, *args, **kwargs):
        return wrapper(self, original, *args, **kwargs)

    setattr(owner, name, replacement)


def _refuse(error: Exception, self, original, *args, **kwargs):
    if asked_for(self):
        raise error
    return original(self, *args, **kwargs)


def _create_engine_config(self, original, *args, **kwargs):
    if not asked_for(self):
        return original(self, *args, **kwargs)
    token = _vocabularies_may_differ.set(True)
    try:
        vllm_config = original(self, *args, **kwargs)
    finally:
        _vocabularies_may_differ.reset(token)
    check_config(vllm_config)
    return vllm_config


def _verify_vocabularies(self, original):
    # The engine masks what one of the models does not know (see `MixedRunner`). The mark stays with the configuration,
    # which vLLM verifies again in each process that copies it.
    if _vocabularies_may_differ.get():
        self.__dict__[CONFIG_KEY] = True
    if CONFIG_KEY not in self.__dict__:
        original(self)


def _validate_params(self, original, params, *args, **kwargs):
    original(self, params, *args, **kwargs)
    if asked_for(self.vllm_config):
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        if isinstance(params, SamplingParams):
            try:
                check_params(params)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error


def _make_runner(self, original, vllm_config, *args, **kwargs):
    if not asked_for(vllm_config):
        return original(self, vllm_config, *args, **kwargs)
    check_config(vllm_config)
    original(self, vllm_config, *args, **kwargs)
    from .runner import MixedRunner

    self.mentor = MixedRunner(self, **vllm_config.additional_config[CONFIG_KEY])


def _raise_if_mismatch(self, original):
    if not asked_for(self.vllm_config):
        original(self)
