"""What the plugin refuses, and that it leaves other engines alone."""

import math
import os
import subprocess
import sys

import pytest
import torch

from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.serving.weights import write_weights
from mentor_trl.vllm_plugin import compat, engine_options
from mentor_trl.vllm_plugin.hooks import check_config
from mentor_trl.vllm_plugin.requests import check_params, parse_row
from statistics_helpers import Tree, misfit, sequences
from vllm_helpers import ENGINE_OPTIONS, check_records, make_model


pytestmark = [pytest.mark.vllm, pytest.mark.shared_engine]


@pytest.fixture(scope="module")
def policy():
    return make_model(seed=12)


@pytest.fixture(scope="module")
def expert():
    return make_model(seed=13)


def test_weights_of_the_policy_alone_are_replaced(policy, expert, engines, folders, tmp_path):
    sampler = engines(policy, expert, draft_length=4, max_num_seqs=200)  # an engine of its own
    digests = {name: sampler.llm.collective_rpc("mentor_digest", args=(name,))[0] for name in ("policy", "expert")}
    # the same long prompt before and after: what the cache holds of the old policy must not be used
    prompt = torch.randint(1, 4, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    request = MixedRequest([prompt] * 2000, [2.0] * 2000, 3, (0,), score_all=True)
    old = Tree(policy, expert, request)
    assert misfit([(sequences(sampler.sample(request)), old.mixed())]) <= 1.0

    newer = make_model(seed=14)
    write_weights(newer.state_dict().items(), tmp_path / "v1")
    sampler.load_policy(tmp_path / "v1", "v1")
    rollout = sampler.sample(request)
    new = Tree(newer, expert, request)
    assert misfit([(sequences(rollout), new.mixed())]) <= 1.0
    assert misfit([(sequences(rollout), old.mixed())]) > 3.0
    check_records(newer, expert, request, rollout)
    assert sampler.llm.collective_rpc("mentor_info")[0]["weights_version"] == "v1"
    assert sampler.llm.collective_rpc("mentor_digest", args=("expert",))[0] == digests["expert"]
    assert sampler.llm.collective_rpc("mentor_digest", args=("policy",))[0] != digests["policy"]
    # and back again, from what was saved
    sampler.load_policy(folders(policy), "v2")
    assert sampler.llm.collective_rpc("mentor_digest", args=("policy",))[0] == digests["policy"]
    with pytest.raises(ValueError, match="no \\*.safetensors"):
        sampler.load_policy(tmp_path / "nowhere", "v3")


def test_log_probabilities_of_vllm_are_those_of_the_mixed_policy(policy, expert, engines):
    from vllm import SamplingParams

    sampler = engines(policy, expert, draft_length=4)
    params = SamplingParams(
        max_tokens=6, logprobs=0, ignore_eos=True, detokenize=False, extra_args={"mentor_gamma": "2.0"}
    )
    prompt = {"prompt_token_ids": [3, 1, 2]}
    tree = Tree(policy, expert, MixedRequest([[3, 1, 2]], [2.0], 6, ()))
    for output in sampler.llm.generate([prompt] * 20, params, use_tqdm=False):
        ids = output.outputs[0].token_ids
        for t, (token, entry) in enumerate(zip(ids, output.outputs[0].logprobs)):
            assert entry[token].logprob == pytest.approx(math.log(tree.m(tuple(ids[:t]))[token]), abs=2e-4)


def test_other_engines_are_left_alone(policy, expert, engines, folders):
    """The plugin is loaded, another engine samples mixed rollouts in the same process, and this one is plain."""
    from vllm import LLM, SamplingParams

    llm = LLM(folders(expert), **ENGINE_OPTIONS)
    engines.keep.append(llm)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert not hasattr(runner, "mentor") and "_sample" not in vars(runner)
    # what a mixed-policy engine refuses
    params = SamplingParams(max_tokens=3, stop_token_ids=[0], ignore_eos=True, top_k=4, detokenize=False, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": [3, 1, 2]}] * 2000, params, use_tqdm=False)
    tree = Tree(policy, expert, MixedRequest([[3, 1, 2]], [1.0], 3, (0,)))
    assert misfit([([tuple(output.outputs[0].token_ids) for output in outputs], tree.expert())]) <= 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_extension_cls": ""}, "worker_extension_cls"),
        ({"max_model_len": 600}, "max_model_len"),
        ({"speculative_config": {"draft_sample_method": "greedy"}}, "draft_sample_method is 'greedy'"),
    ],
)
def test_engines_that_would_sample_wrongly_are_refused(options, message, policy, expert, folders, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    arguments = {**engine_options(folders(policy), folders(expert)), **ENGINE_OPTIONS}
    speculative = {**arguments["speculative_config"], **options.get("speculative_config", {})}
    arguments |= {**options, "speculative_config": speculative}
    with pytest.raises(ValueError, match=message):
        EngineArgs(**arguments).create_engine_config()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("scheduler_config", "async_scheduling", True),
        ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "data_parallel_size", 2),
    ],
)
def test_configurations_that_this_machine_cannot_start_are_refused(
    part, name, value, policy, expert, folders, monkeypatch
):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    config = EngineArgs(**engine_options(folders(policy), folders(expert)), **ENGINE_OPTIONS).create_engine_config()
    check_config(config)
    setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=f"{name} is {value} and must be"):
        check_config(config)


def test_the_other_model_runner_is_refused(policy, expert, folders, monkeypatch):
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    config = EngineArgs(**engine_options(folders(policy), folders(expert)), **ENGINE_OPTIONS).create_engine_config()
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda self: True))
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER.* is True and must be False"):
        check_config(config)


def test_other_versions_of_vllm_are_refused(policy, expert, folders):
    """In a fresh process: an engine that asks fails with the fix, one that does not is not touched."""
    program = f"""
import vllm
vllm.__version__ = "0.99.0"
from mentor_trl.vllm_plugin import engine_options, register
register()
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model={folders(expert)!r}, skip_tokenizer_init=True).create_engine_config()
print("plain engine made")
EngineArgs(**engine_options({folders(policy)!r}, {folders(expert)!r})).create_engine_config()
"""
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "plain engine made" in done.stdout and done.returncode != 0
    assert "vLLM 0.99.0 is installed" in done.stderr and "pip install" in done.stderr


def test_missing_and_changed_symbols_are_named():
    with pytest.raises(compat.IncompatibleVLLM, match="vllm.v1.outputs:NoSuchThing"):
        compat.check_symbols({"vllm.v1.outputs:NoSuchThing": ()})
    with pytest.raises(compat.IncompatibleVLLM, match="not \\['other'\\]"):
        compat.check_symbols({"vllm.v1.outputs:SamplerOutput": ("sampled_token_ids", "other")})
    compat.check_symbols(compat.SYMBOLS | compat.WORKER_SYMBOLS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, r"cannot honour top_p=0\.9\. Leave"),
        ({"top_k": 5}, r"cannot honour top_k=5\. Leave"),
        ({"min_p": 0.1}, r"cannot honour min_p=0\.1\. Leave"),
        ({"seed": 3}, r"cannot honour seed=3\. Leave"),
        ({"temperature": 0.0}, r"temperature=0\.0 is greedy decoding.*Set a positive"),
        ({"presence_penalty": 0.5}, r"cannot honour presence_penalty=0\.5\. Leave"),
        ({"logit_bias": {1: 2.0}}, r"cannot honour logit_bias=\{1: 2\.0\}\. Leave"),
        ({"bad_words": ["a"]}, r"cannot honour bad_words=\['a'\]\. Leave"),
        ({"prompt_logprobs": 1}, r"cannot honour prompt_logprobs=1\. Leave"),
        ({"logprobs": 3}, r"logprobs=3: .*Set logprobs=0"),
        ({"min_tokens": 2}, r"cannot honour min_tokens=2\. Leave"),
        ({"n": 2, "extra_args": {"mentor_record": "key"}}, r"n=2 with `mentor_record`: send one request per row"),
        ({"extra_args": {"mentor_gama": "1.0"}}, r"Unknown entries \['mentor_gama'\]; a request knows"),
        ({"extra_args": {"mentor_gamma": 0}}, r"`mentor_gamma` is 0\.0; it must be positive"),
        (
            {"extra_args": {"mentor_gamma": "much"}},
            r"`mentor_gamma`, `mentor_share` and `mentor_span` must be numbers.*'much'",
        ),
        ({"extra_args": {"mentor_rule": "sometimes"}}, r"`mentor_rule` is 'sometimes'; choose one of"),
        ({"extra_args": {"mentor_share": 1.5}}, r"`mentor_share` is 1\.5; it must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_honoured_are_refused(options, message, policy, expert, engines):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params = SamplingParams(max_tokens=2, detokenize=False, **options)
    with pytest.raises(ValueError, match=message):
        check_params(params)
    if "bad_words" in options:  # which need a tokenizer
        return
    if options.keys() & {"min_p", "logit_bias"}:  # which vLLM refuses by itself
        message = "min_p and logit_bias sampling parameters are not yet supported"
    with pytest.raises(VLLMValidationError, match=message):
        engines(policy, expert, draft_length=4).llm.generate([{"prompt_token_ids": [1]}], params, use_tqdm=False)


def test_a_request_without_entries_is_the_plain_policy(policy, expert, engines):
    from vllm import SamplingParams

    for entries in (None, {"other": 1}, {"mentor_gamma": "inf"}):
        assert parse_row(entries).gamma == math.inf
    params = SamplingParams(max_tokens=3, stop_token_ids=[0], ignore_eos=True, detokenize=False)
    llm = engines(policy, expert, draft_length=4).llm
    outputs = llm.generate([{"prompt_token_ids": [3, 1, 2]}] * 2000, params, use_tqdm=False)
    tree = Tree(policy, expert, MixedRequest([[3, 1, 2]], [1.0], 3, (0,)))
    assert misfit([([tuple(output.outputs[0].token_ids) for output in outputs], tree.policy())]) <= 1.0
