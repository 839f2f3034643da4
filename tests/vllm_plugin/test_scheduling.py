"""
Rows that vLLM's scheduler chunks, preempts, pads, trims or brings near the length limit: each without drafts at some
point in mid-sequence, and each an exact sample of the mixed policy all the same.
"""

import math

import pytest
import torch

from mentor_trl.rollout import MixedRequest
from statistics_helpers import Tree, labelled, misfit, project, sequences
from vllm_helpers import check_records, make_model


pytestmark = [pytest.mark.vllm, pytest.mark.shared_engine]

INF = math.inf
SMALL = {"draft_length": 4, "block_size": 32}


@pytest.fixture(scope="module")
def policy():
    return make_model(seed=12)


@pytest.fixture(scope="module")
def expert():
    return make_model(seed=13)


def random_prompts(count: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 4, (lengths[row % len(lengths)],), generator=generator).tolist() for row in range(count)]


def plans_of(sampler) -> list:
    """Collects, from now on, which rows of each step bring the policy's own drafts."""
    mentor, plans = sampler.llm.llm_engine.model_executor.driver_worker.worker.model_runner.mentor, []
    if not hasattr(mentor, "plain_plan"):
        mentor.plain_plan = mentor._plan

    def plan(metadata):
        plans.append(mentor.plain_plan(metadata))
        return plans[-1]

    mentor._plan = plan
    return plans


def test_chunked_prefill(policy, expert, engines):
    sampler = engines(policy, expert, **SMALL, max_num_batched_tokens=24, max_num_seqs=4)
    (prompt,) = random_prompts(1, [50])
    request = MixedRequest([prompt] * 1200, [2.0] * 1200, 3, (0,), score_all=True)
    rollout = sampler.sample(request)
    assert misfit([(labelled(rollout), (tree := Tree(policy, expert, request)).joint(tree.outcomes))]) <= 1.0
    assert misfit([(sequences(rollout), tree.policy())]) > 3.0
    assert misfit([(sequences(rollout), tree.expert())]) > 3.0

    plans = plans_of(sampler)
    prompts = random_prompts(24, [50, 3, 27])
    request = MixedRequest(prompts, [2.0, INF, 1.0] * 8, 14, (0,), score_all=True)
    check_records(policy, expert, request, sampler.sample(request))
    # prompts in several chunks, beside rows that decode
    assert any(False in plan.live and True in plan.live for plan in plans)


def test_preemption(policy, expert, engines, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def counted(self, *args, **kwargs):
        preempted.append(1)
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    sampler = engines(policy, expert, **SMALL, num_gpu_blocks_override=8, max_num_seqs=8)
    prompts = random_prompts(48, [26, 29, 31])
    request = MixedRequest(prompts, [2.0, 1.0, INF] * 16, 30, (), score_all=True)
    rollout = sampler.sample(request)
    assert len(preempted) > 10
    check_records(policy, expert, request, rollout)

    preempted.clear()
    (prompt,) = random_prompts(1, [28], seed=1)
    request = MixedRequest([prompt] * 1500, [2.0] * 1500, 8, (), score_all=True)
    rows = sequences(sampler.sample(request))
    tree = Tree(policy, expert, MixedRequest([prompt], [2.0], 8, ()))
    for part in (slice(0, 4), slice(4, 8)):
        assert misfit([([row[part] for row in rows], project(tree.mixed(), lambda row, part=part: row[part]))]) <= 1.0
    assert misfit([(rows, tree.policy())]) > 3.0 or misfit([(rows, tree.expert())]) > 3.0
    assert preempted


def test_near_the_length_limit(policy, expert, engines):
    """Where one row is too close to the limit, vLLM drafts for none; the policy must still have read all rows."""
    sampler = engines(policy, expert, **SMALL)
    plans = plans_of(sampler)
    limit = sampler.info["max_model_len"]
    prompts = random_prompts(30, [limit - 12, 8, limit - 20, 3])
    request = MixedRequest(prompts, [1.5, 2.0, INF] * 10, 12, (), score_all=True)
    rollout = sampler.sample(request)
    assert all(len(ids) == 12 for ids in rollout.completion_ids)
    check_records(policy, expert, request, rollout)
    assert any(any(plan.counts) and not any(plan.drafted) for plan in plans)

    (prompt,) = random_prompts(1, [limit - 5])
    request = MixedRequest([prompt] * 2000, [2.0] * 2000, 5, (0,))
    rows = sequences(sampler.sample(request))
    tree = Tree(policy, expert, request)
    assert misfit([(rows, tree.mixed())]) <= 1.0
    assert misfit([(rows, tree.policy())]) > 3.0
    assert misfit([(rows, tree.expert())]) > 3.0


def test_prompts_in_chunks_beside_rows_near_the_length_limit(policy, expert, engines):
    """The drafter is skipped while a prompt is being read: the policy's cache must not have holes there."""
    sampler = engines(policy, expert, **SMALL, max_num_batched_tokens=24, max_num_seqs=4)
    prompts = random_prompts(60, [50, 40, 6, 49], seed=3)
    request = MixedRequest(prompts, [1.5, INF, 2.0, INF, INF] * 12, 14, (0,), score_all=True)
    check_records(policy, expert, request, sampler.sample(request))


def test_padded_drafts(policy, expert, engines):
    """A prompt that is cached but for its last token begins with drafts of -1, which are nobody's."""
    sampler = engines(policy, expert, **SMALL)
    (prompt,) = random_prompts(1, [33])
    sampler.sample(MixedRequest([prompt], [2.0], 1, ()))
    plans = plans_of(sampler)
    request = MixedRequest([prompt] * 2000, [2.0] * 2000, 3, (0,), score_all=True)
    rollout = sampler.sample(request)
    tree = Tree(policy, expert, request)
    assert misfit([(labelled(rollout), tree.joint(tree.outcomes))]) <= 1.0
    assert any(count and not own for plan in plans for count, own in zip(plan.counts, plan.drafted))


def test_token_budget_that_trims_drafts(policy, expert, engines):
    """Eight rows of five tokens a step do not fit 22: drafts are cut short, and rows sit steps out."""
    sampler = engines(policy, expert, **SMALL, max_num_batched_tokens=22, max_num_seqs=8)
    plans = plans_of(sampler)
    prompts = random_prompts(40, [4, 7, 2])
    request = MixedRequest(prompts, [2.0, INF, 1.0, 4.0] * 10, 24, (0,), score_all=True)
    check_records(policy, expert, request, sampler.sample(request))
    lengths = {count for plan in plans for count, own in zip(plan.counts, plan.drafted) if own}
    assert len(lengths) > 1


def test_64_rows_with_many_ends(policy, expert, engines):
    sampler = engines(policy, expert, **SMALL, max_num_seqs=64)
    prompts = random_prompts(64, [3, 9, 20])
    request = MixedRequest(prompts, [2.0, INF, 1e-6, 3.0] * 16, 40, (0,), temperature=1.2, score_all=True)
    rollout = sampler.sample(request)
    check_records(policy, expert, request, rollout)
    by_eos = [ids[-1] == 0 for ids in rollout.completion_ids]
    assert any(by_eos) and all(0 not in ids[:-1] for ids in rollout.completion_ids)
    assert all(end or len(ids) == 40 for end, ids in zip(by_eos, rollout.completion_ids))


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4)], ids=["expert-larger", "policy-larger"])
def test_vocabularies_padded_differently(sizes, engines):
    models = [make_model(seed=seed, vocab_size=size) for seed, size in zip((12, 13), sizes)]
    trimmed = [make_model(seed=seed, vocab_size=size) for seed, size in zip((12, 13), sizes)]
    for model in trimmed:
        model.resize_token_embeddings(4)
    sampler = engines(*models, draft_length=4, num_tokens=4)
    request = MixedRequest([[3, 1, 2]] * 2000, [2.0] * 2000, 4, (0,), score_all=True)
    rollout = sampler.sample(request)
    tree = Tree(*trimmed, request)
    assert misfit([(labelled(rollout), tree.joint(tree.outcomes))]) <= 1.0
    check_records(*trimmed, request, rollout)


def test_context_is_checked(policy, expert, engines):
    sampler = engines(policy, expert, **SMALL)
    with pytest.raises(ValueError, match="A prompt of 60 tokens .* context of 64 tokens"):
        sampler.sample(MixedRequest([[1] * 60], [2.0], 5, ()))


def test_a_row_without_rows(policy, expert, engines):
    rollout = engines(policy, expert, **SMALL).sample(MixedRequest([], [], 5, ()))
    assert rollout.completion_ids == [] and rollout.entropies.shape == (0, 0)
