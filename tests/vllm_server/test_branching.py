"""The processor inside an engine: where requests end, and how what they return is distributed."""

import math
import random

import pytest
import torch

from branching_helpers import BRANCH, END, generate, make_engine, make_policy, sampling, segment, segments
from mentor_trl.objective import coin_uniforms, request_seed
from mentor_trl.vllm_server.options import GAMMA, SEED
from statistics_helpers import forward_logps, misfit


pytestmark = pytest.mark.vllm

INF = math.inf
ROWS = 2000


@pytest.fixture(scope="module")
def models():
    return make_policy()


@pytest.fixture(scope="module")
def policy(models):
    return models[1]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    models[0].save_pretrained(path := tmp_path_factory.mktemp("policy"))
    return str(path)


@pytest.fixture(scope="module")
def engine(folder):
    return make_engine(folder)


def row_seeds(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2**62) for _ in range(count)]


def random_prompts(count: int, lengths: list[int]) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(4) for _ in range(lengths[row % len(lengths)])] for row in range(count)]


def coins(seed: int, start: int, count: int, share: float) -> list[bool]:
    uniforms = coin_uniforms(torch.full((count,), seed), torch.arange(start, start + count))
    return (uniforms < share).tolist()


@pytest.mark.parametrize("seeded", [True, False])
def test_requests_end_where_the_coins_say(seeded, engine):
    seeds, prompts = row_seeds(96), random_prompts(96, [1, 7, 2, 30, 13])
    params = [
        sampling(seed, max_tokens=12, seed=request_seed(seed, len(prompt), "policy") if seeded else None)
        for seed, prompt in zip(seeds, prompts)
    ]
    lengths = set()
    for seed, prompt, output in zip(seeds, prompts, generate(engine, prompts, params)):
        branch = [*coins(seed, len(prompt), 12, 0.5), True].index(True)
        assert len(segment(output)) == min(branch + 1, 12)
        assert (output.finish_reason, output.stop_reason) == (("stop", BRANCH) if branch < 12 else ("length", None))
        lengths.add(branch)
    assert {0, 1, 2} <= lengths


CASES = [
    ("entropy", {"gamma": 2.5}),
    ("entropy", {"gamma": 1.2}),
    ("threshold", {"gamma": 1.0}),
    ("random", {"gamma": 1.0, "share": 0.7}),
    ("always", {"gamma": 1.0}),
    ("sentence", {"gamma": 1.0, "share": 0.6}),
    ("sentence", {"gamma": 1.0, "share": 0.6, "span": 2}),
    ("entropy", {"gamma": INF}),
]
PROMPTS = [[3, 1, 2], [2, END], [0], [3, 3, 1, 0, 2]]


def case_rows(temperature: float, rules=CASES, rows: int = ROWS, **params):
    """Every rule and gamma, on prompts of unequal length, in one batch of seeded rows."""
    kinds = [(rule, options, prompt) for rule, options in rules for prompt in PROMPTS]
    prompts, requests = [], []
    for seed in row_seeds(rows // len(PROMPTS), seed=2):
        for rule, options, prompt in kinds:
            settings = {"rule": rule, "temperature": temperature, "max_tokens": 3, **options, **params}
            requests.append(sampling(seed, seed=request_seed(seed, len(prompts), "policy"), **settings))
            prompts.append(prompt)
    return kinds, prompts, requests


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_law_of_every_rule_in_one_batch(temperature, engine, policy):
    kinds, prompts, requests = case_rows(temperature, stop_token_ids=[BRANCH, 0])
    found = [segment(output) for output in generate(engine, prompts, requests)]
    laws = [
        segments(policy, prompt, 3, rule=rule, temperature=temperature, stop=(0,), **options)
        for rule, options, prompt in kinds
    ]
    of_case = lambda case: range(case * len(PROMPTS), (case + 1) * len(PROMPTS))
    for case in range(len(CASES)):
        groups = [found[at :: len(kinds)] for at in of_case(case)]
        for other in range(len(CASES)):
            fit = misfit(zip(groups, (laws[at] for at in of_case(other))))
            assert (fit <= 1.0) if case == other else (fit > 3.0), (CASES[case], CASES[other])


def test_truncation_is_of_what_is_drawn_alone(engine, policy):
    """w is a function of the whole distribution, and the token one of the truncated one."""

    def top_k(p):
        kept = torch.where(p >= p.topk(2).values[-1], p, 0.0)
        return kept / kept.sum()

    kinds, prompts, requests = case_rows(1.7, [("entropy", {"gamma": 2.5})], top_k=2)
    found = [segment(output) for output in generate(engine, prompts, requests)]
    for keep, right in ((top_k, True), (None, False)):
        fit = misfit(
            (found[at :: len(kinds)], segments(policy, prompt, 3, rule=rule, temperature=1.7, keep=keep, **options))
            for at, (rule, options, prompt) in enumerate(kinds)
        )
        assert fit <= 1.0 if right else fit > 3.0, fit


def test_log_probabilities_are_those_of_forward_passes(engine, policy):
    """Off branch points, at the temperature of each request; of plain rows as well."""
    prompts, seeds = random_prompts(64, [2, 9, 21]), row_seeds(64)
    temperatures = [0.6, 1.0, 1.7, 1.0]
    params = [
        sampling(seed, temperature=temperatures[row % 4], max_tokens=16, share=0.1, gamma=INF if row % 4 == 3 else 1.0)
        for row, seed in enumerate(seeds)
    ]
    checked = 0
    for row, (prompt, output) in enumerate(zip(prompts, generate(engine, prompts, params))):
        ids = [index for index in output.token_ids if index != BRANCH]
        if ids:
            logps = forward_logps(policy, torch.tensor([[*prompt, *ids]]), temperatures[row % 4])
            expected = logps[0, len(prompt) - 1 : -1].gather(1, torch.tensor(ids).unsqueeze(1))[:, 0].tolist()
            found = [entry[index].logprob for index, entry in zip(ids, output.logprobs)]
            assert found == pytest.approx(expected, abs=2e-4)
            checked += len(ids)
    assert checked > 300


def test_a_row_does_not_depend_on_its_batch(engine):
    prompts, seeds = random_prompts(24, [2, 9, 21]), row_seeds(24)
    params = [sampling(seed, share=0.2, max_tokens=10, seed=request_seed(seed, 0, "policy")) for seed in seeds]
    together = [output.token_ids for output in generate(engine, prompts, params)]
    others = [sampling(seed, gamma=INF, max_tokens=7) for seed in row_seeds(40, seed=3)]
    mixed = generate(engine, [*random_prompts(40, [5]), *reversed(prompts)], [*others, *reversed(params)])
    assert [output.token_ids for output in mixed[:39:-1]] == together
    assert [generate(engine, [prompts[row]], [params[row]])[0].token_ids for row in (0, 7, 23)] == [
        together[row] for row in (0, 7, 23)
    ]


def test_plain_requests_may_ask_for_anything(engine):
    """Greedy, biased and penalised, beside rows that branch; ids that are masked stay so."""
    plain = [
        sampling(0, extra_args=None, temperature=0.0),
        sampling(0, extra_args=None, logit_bias={2: 100.0}),
        sampling(0, extra_args=None, repetition_penalty=1.5, min_tokens=2, n=2),
        sampling(0, extra_args=None, allowed_token_ids=[3, BRANCH]),
        sampling(0),
    ]
    outputs = generate(engine, [[3, 1, 2]] * 5, plain)
    assert list(outputs[1].token_ids) == [2] * 4 and list(outputs[3].token_ids) == [3] * 4
    assert all(max(output.token_ids) < 4 for output in outputs[:4])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"n": 2, "stop": ["x"], "detokenize": True}, "n=2.*stop="),
        ({"logit_bias": {1: 2.0}}, "logit_bias"),
        ({"extra_args": {GAMMA: "1.0", SEED: "1", "mentor_record": "a"}}, "mentor_record"),
        ({"extra_args": {GAMMA: "1.0"}}, SEED),
    ],
)
def test_what_would_not_be_exact_is_refused_and_the_engine_lives(params, message, engine):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        generate(engine, [[1]], [sampling(0, **params)])
    assert len(generate(engine, [[1]], [sampling(0, gamma=INF)])[0].token_ids) == 4


def test_what_the_engine_says_that_it_is(engine, folder):
    (info,) = engine.collective_rpc("mentor_info")
    assert info["kind"] == "policy" and info["branches"] and info["policy"] == folder
    assert (info["num_tokens"], info["branch_id"], info["weights_version"]) == (4, BRANCH, "initial")


def test_preemption(folder, policy, monkeypatch):
    """
    A cache too small for the batch: rows begin anew in mid-sequence, and their coins stay. Prompts that do not fit a
    step are not split, which requests with seeds would not survive on a CPU.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def counted(self, *args, **kwargs):
        preempted.append(1)
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    small = make_engine(folder, block_size=32, num_gpu_blocks_override=8, max_num_seqs=8, max_num_batched_tokens=64)
    seeds, prompts = row_seeds(48, seed=5), random_prompts(48, [26, 29, 31])
    params = [sampling(seed, share=0.04, max_tokens=30, seed=seed) for seed in seeds]
    for seed, prompt, output in zip(seeds, prompts, generate(small, prompts, params)):
        branch = [*coins(seed, len(prompt), 30, 0.04), True].index(True)
        assert len(segment(output)) == min(branch + 1, 30)
    assert len(preempted) > 10

    preempted.clear()
    prompt = prompts[0]
    params = [sampling(seed, share=0.1, max_tokens=8, seed=seed) for seed in row_seeds(600, seed=6)]
    found = [segment(output) for output in generate(small, [prompt] * 600, params)]
    assert misfit([(found, segments(policy, prompt, 8, 1.0, "random", 0.1))]) <= 1.0 and preempted
