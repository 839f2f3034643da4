"""Rows of two stock vLLM engines in this process against the enumerated mixture."""

import math
from dataclasses import replace

import pytest
import torch

from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.stock.stock_sampler import StockSampler, check_branching
from statistics_helpers import forward_logps, make_peaked_model, misfit, sequences
from stock_llm_helpers import BothEngines, LLMExpert, make_policy, truncated
from test_exactness import CASES, SENTENCE_IDS


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def models():
    return [make_peaked_model(seed=seed, head_dim=32) for seed in (12, 13)]


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("stock")
    expert = LLMExpert(root / "expert", models[1])
    return BothEngines(make_policy(root / "policy", models[0], sentence_ids=SENTENCE_IDS), expert)


@pytest.fixture(scope="module")
def sampler(engine):
    return StockSampler(engine, engine.expert)


def check_law(case, request, models, sampler):
    trees = case.trees(*models, request)
    rows = case.split(sequences(sampler.sample(request)))
    assert misfit((group, tree.mixed()) for group, tree in zip(rows, trees)) <= 1.0
    if case.between:
        assert misfit((group, tree.policy()) for group, tree in zip(rows, trees)) > 2.0
        assert misfit((group, tree.expert()) for group, tree in zip(rows, trees)) > 2.0


@pytest.mark.parametrize("name", [name for name in CASES if name != "score-all"])
def test_joint_distribution_of_rows(name, models, sampler):
    check_law(CASES[name], CASES[name].request(), models, sampler)


def test_the_engine_branches_where_the_coins_say_so(engine):
    check_branching(engine, engine.run, 4, "The engine")


def test_records_equal_forward_passes(models, sampler):
    case = CASES["mixed-gammas"]
    request = case.request(rows=64, temperature=1.3, max_new_tokens=12, stop_token_ids=())
    rollout = sampler.sample(request)
    assert rollout.branch.any() and not rollout.logps_at_branches
    for row, (prompt, ids) in enumerate(zip(request.prompt_ids, rollout.completion_ids)):
        where = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
        p, s = (forward_logps(model, torch.tensor([prompt + ids]), 1.3)[0, where] for model in models)
        index, branch = torch.tensor(ids).unsqueeze(1), rollout.branch[row, : len(ids)]
        for name, values in (("logps", p), ("expert_logps", s)):
            found, due = getattr(rollout, name)[row, : len(ids)], values.gather(1, index)[:, 0].float()
            here = branch if name == "expert_logps" else ~branch
            torch.testing.assert_close(found, due.where(here, torch.nan), atol=2e-4, rtol=0, equal_nan=True)


def test_the_same_seed_gives_the_same_rows_whatever_else_is_sampled(sampler):
    request = CASES["ragged-prompts"].request(rows=60, max_new_tokens=12)
    whole, some = sampler.sample(request), slice(20, 30)
    part = replace(
        request, prompt_ids=request.prompt_ids[some], gamma=request.gamma[some], row_seeds=request.row_seeds[some]
    )
    assert sampler.sample(part).completion_ids == whole.completion_ids[some]
    assert sampler.sample(replace(request, seed=2, row_seeds=())).completion_ids != whole.completion_ids


@pytest.mark.parametrize("settings", [{"top_p": 0.8}, {"top_k": 2}, {"min_p": 0.3}, {"top_p": 0.6, "top_k": 3}])
def test_truncated_mixtures(settings, models, engine):
    """w is that of the whole distribution of the policy; what is drawn is truncated."""
    case = CASES["w-medium"]
    request = case.request(max_new_tokens=3)
    (tree,) = case.trees(*models, request)
    cut = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **settings}
    for part in (tree.p, tree.s):
        for prefix, probs in part.items():
            part[prefix] = truncated([math.log(p) for p in probs], **cut)
    rows = sequences(StockSampler(engine, engine.expert, **settings).sample(request))
    mixed = {row: chance for row, chance in tree.mixed().items() if chance > 0.0}
    assert misfit([(rows, mixed)]) <= 1.0
    (whole,) = case.trees(*models, request)
    assert misfit([(rows, whole.mixed())]) > 2.0


def test_preemption(models, tmp_path_factory, monkeypatch):
    """An engine that is out of blocks asks for a position twice: the coin is the same, and rows keep their law."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def counted(self, *args, **kwargs):
        preempted.append(1)
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    root = tmp_path_factory.mktemp("small")
    tight = make_policy(root / "policy", models[0], num_gpu_blocks_override=10, max_num_seqs=8, block_size=32)
    expert = LLMExpert(root / "expert", models[1])
    small = StockSampler(BothEngines(tight, expert), expert)
    prompt = [3, 1, 2] * 10
    request = MixedRequest([prompt] * 600, [2.0] * 600, 4, (), seed=1)
    (tree,) = replace(CASES["w-medium"], groups=[(prompt, 2.0)]).trees(*models, request)
    assert misfit([(sequences(small.sample(request)), tree.mixed())]) <= 1.0
    assert len(preempted) > 3
