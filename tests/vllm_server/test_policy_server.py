"""A server of a policy that branches: rows over HTTP, new weights, adapters."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from branching_helpers import BRANCH, make_policy, segments
from helpers import make_letter_tokenizer
from mentor_trl.objective import coin_uniforms, request_seed
from mentor_trl.rollout.serving.weights import write_weights
from mentor_trl.vllm_server.options import GAMMA, RULE, SEED, SHARE
from server_process import serving_models
from statistics_helpers import forward_logps, misfit


pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = ("--max-num-batched-tokens", "64", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")


@pytest.fixture(scope="module")
def models():
    return make_policy()


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    models[0].save_pretrained(folder / "policy")
    make_letter_tokenizer("abcd").save_pretrained(folder / "policy")
    with serving_models(str(folder / "policy"), None, folder / "log.txt", *OPTIONS) as started:
        yield started


@pytest.fixture
def ask(server):
    """`ask(path, **body)`: an answer that is no error."""
    # Of a pool that many threads share one may close an idle connection that another has just been given
    alone = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=120.0, limits=alone) as client:

        def ask(path, **body):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return (
                answer.json() if answer.headers.get("content-type", "").startswith("application/json") else answer.text
            )

        yield ask


@pytest.fixture
def info(ask):
    return ask("/collective_rpc", method="mentor_info")["results"][0]


@pytest.fixture
def complete(ask, info):
    def complete(row: int, prompt: list[int], share: float = 0.5, **body) -> dict:
        extra = {GAMMA: "1.0", RULE: "random", SHARE: str(share), SEED: str(row)}
        own = {"model": info["policy"], "max_tokens": 6, "ignore_eos": True, "logprobs": 0, "temperature": 1.0}
        own |= {"stop_token_ids": [info["branch_id"]], "seed": request_seed(row, len(prompt), "policy")}
        answer = ask("/v1/completions", prompt=prompt, vllm_xargs=extra, return_token_ids=True, **{**own, **body})
        return answer["choices"][0]

    return complete


def check_logps(model, prompt: list[int], choice: dict) -> None:
    ids = [index for index in choice["token_ids"] if index != BRANCH]
    logps = forward_logps(model, torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 :]
    expected = [logps[at, index].item() for at, index in enumerate(ids)]
    assert choice["logprobs"]["token_logprobs"][: len(ids)] == pytest.approx(expected, abs=2e-4)


def test_health_and_info(server, info, capsys):
    from mentor_trl.cli.main import main

    assert main(["health", server.url]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == info | {"paused": False} and shown["kind"] == "policy" and shown["branches"]
    assert (shown["num_tokens"], shown["branch_id"], shown["weights_version"]) == (4, BRANCH, "initial")


def test_requests_at_once_end_where_the_coins_say(complete, models):
    """Of unequal prompts with seeds, many of which do not fit one step together."""
    prompts = [[3, 1, 2, 0, 1][: 1 + row % 5] * (1 + row % 9) for row in range(96)]
    with ThreadPoolExecutor(max_workers=96) as pool:
        choices = list(pool.map(complete, range(96), prompts))
    for row, (prompt, choice) in enumerate(zip(prompts, choices)):
        uniforms = coin_uniforms(torch.full((6,), row), torch.arange(len(prompt), len(prompt) + 6))
        branch = [*(uniforms < 0.5).tolist(), True].index(True)
        assert len(choice["token_ids"]) == min(branch + 1, 6)
        assert choice["stop_reason"] == (BRANCH if branch < 6 else None)
        check_logps(models[1], prompt, choice)


def test_new_weights(ask, complete, tmp_path, models):
    served, trimmed = make_policy(seed=17)
    write_weights(served.state_dict().items(), tmp_path / "weights")
    ask("/collective_rpc", method="mentor_load_policy", args=[str(tmp_path / "weights"), "second"])
    ask("/reset_prefix_cache")
    try:
        assert ask("/collective_rpc", method="mentor_info")["results"][0]["weights_version"] == "second"
        with ThreadPoolExecutor(max_workers=64) as pool:
            choices = list(pool.map(lambda row: complete(row, [3, 1, 2], max_tokens=2), range(400)))
        rows = [tuple("branch" if index == BRANCH else index for index in choice["token_ids"]) for choice in choices]
        assert misfit([(rows, segments(trimmed, [3, 1, 2], 2, 1.0, "random"))]) <= 1.0
        assert misfit([(rows, segments(models[1], [3, 1, 2], 2, 1.0, "random"))]) > 3.0
    finally:
        write_weights(models[0].state_dict().items(), tmp_path / "first")
        ask("/collective_rpc", method="mentor_load_policy", args=[str(tmp_path / "first"), "initial"])
        ask("/reset_prefix_cache")


def test_an_adapter(ask, complete, models, tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(make_policy()[0], config)
    adapted.save_pretrained(tmp_path / "adapter")
    ask("/v1/load_lora_adapter", lora_name="second", lora_path=str(tmp_path / "adapter"))
    trimmed = adapted.merge_and_unload()
    trimmed.resize_token_embeddings(4)
    differs = 0
    for row in range(8):
        choice = complete(row, [3, 1, 2], share=0.1, model="second")
        check_logps(trimmed.eval(), [3, 1, 2], choice)
        base = forward_logps(models[1], torch.tensor([[3, 1, 2]]))[0, -1]
        differs += abs(base[choice["token_ids"][0] % 4].item() - choice["logprobs"]["token_logprobs"][0]) > 1e-2
    assert differs
    ask("/v1/unload_lora_adapter", lora_name="second")
    check_logps(models[1], [3, 1, 2], complete(0, [3, 1, 2], share=0.0))


def test_what_would_not_be_exact_is_refused(server, info):
    for body, message in (
        ({"temperature": 0.0, "vllm_xargs": {GAMMA: "1.0", SEED: "1"}}, "greedy"),
        ({"n": 2, "vllm_xargs": {GAMMA: "1.0", SEED: "1"}}, "n=2"),
        ({"vllm_xargs": {"mentor_record": "a"}}, "mentor_record"),
    ):
        body = {"model": info["policy"], "prompt": [1], **body}
        answer = httpx.post(f"{server.url}/v1/completions", headers=server.headers, json=body)
        assert answer.status_code == 400 and message in answer.text
