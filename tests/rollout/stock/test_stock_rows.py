"""Rows of two engines that know nothing of each other, against the enumerated mixture."""

import math
from dataclasses import replace

import pytest
import torch

from mentor_trl.errors import EngineError, SetupError
from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.stock.stock_rows import KnownCoins, Row
from mentor_trl.rollout.stock.stock_sampler import StockSampler, check_branching
from statistics_helpers import make_peaked_model, misfit, sequences
from stock_helpers import EnumeratedExpert, EnumeratedPolicy, sample_stock
from test_exactness import CASES


@pytest.fixture(scope="module")
def policy():
    return make_peaked_model(seed=0)


@pytest.fixture(scope="module")
def expert():
    return make_peaked_model(seed=1)


@pytest.mark.parametrize("name", [name for name in CASES if name != "score-all"])
def test_joint_distribution_of_rows(name, policy, expert):
    case = CASES[name]
    request = case.request()
    rows = case.split(sequences(sample_stock(policy, expert, request)))
    trees = case.trees(policy, expert, request)
    assert misfit((group, tree.mixed()) for group, tree in zip(rows, trees)) <= 1.0
    if case.between:
        assert misfit((group, tree.policy()) for group, tree in zip(rows, trees)) > 3.0
        assert misfit((group, tree.expert()) for group, tree in zip(rows, trees)) > 3.0


def test_joint_distribution_of_tokens_and_branch_points(policy, expert):
    case = CASES["w-medium"]
    request = case.request(max_new_tokens=3)
    (tree,) = case.trees(policy, expert, request)
    rollout = sample_stock(policy, expert, request)
    rows = [tuple(zip(ids, branch)) for ids, branch in zip(rollout.completion_ids, rollout.branch.tolist())]
    outcomes = lambda prefix: [
        ((y, z), chance)
        for y in range(4)
        for z, chance in (
            (False, (1 - tree.w[prefix]) * tree.p[prefix][y]),
            (True, tree.w[prefix] * tree.s[prefix][y]),
        )
    ]
    assert misfit([(rows, tree.joint(outcomes))]) <= 1.0


def test_records(policy, expert):
    case = CASES["mixed-gammas"]
    request = case.request(rows=200, temperature=1.3)
    rollout = sample_stock(policy, expert, request)
    trees = case.trees(policy, expert, request)
    for row, ids in enumerate(rollout.completion_ids):
        tree = trees[row % len(trees)]
        for t, y in enumerate(ids):
            prefix, branch = tuple(ids[:t]), rollout.branch[row, t]
            known = {"logps": tree.p, "expert_logps": tree.s}
            for name, here in (("logps", not branch), ("expert_logps", branch)):
                value = getattr(rollout, name)[row, t].item()
                assert (
                    value == pytest.approx(math.log(known[name][prefix][y]), abs=1e-4) if here else math.isnan(value)
                )
        assert not rollout.branch[row, len(ids) :].any()
    assert not rollout.branch[request.gamma.index(math.inf)].any() and not rollout.logps_at_branches
    assert rollout.entropies is rollout.weights is rollout.mixed_logps is rollout.replaced is None
    assert rollout.policy_logps()[3].count(None) == rollout.branch[3].sum()


@pytest.mark.parametrize("rule", ["random", "sentence", "always", "entropy"])
def test_neighbouring_branch_points_are_one_request(rule, policy, expert):
    """Where the coins are known without the policy, it is not asked for what the expert says."""
    options = {"branch_rule": rule, "share": 1.0, "span": 2, "sentence_ids": (1,), "stop_token_ids": ()}
    request = MixedRequest([[3, 2], [3, 1], [1, 3]], [1e-9] * 3, 6, seed=2, **options)
    engine, speaker = EnumeratedPolicy(policy), EnumeratedExpert(expert)
    rollout = StockSampler(engine, speaker).sample(request)
    if rule in ("random", "always"):
        assert rollout.branch.all() and speaker.asked == [(2, 6)] * 3 and not engine.asked
    if rule == "entropy":  # w = 1, which only the policy's engine knows
        assert rollout.branch.all() and len(speaker.asked) == len(engine.asked) == 18
    if rule == "sentence":
        for row, ids in enumerate(rollout.completion_ids):
            whole = request.prompt_ids[row] + ids
            assert rollout.branch[row].tolist() == [1 in whole[t : t + 2] for t in range(len(ids))]
        assert (2, 2) in speaker.asked and (2, 1) in speaker.asked and engine.asked


def test_coins_of_a_share_are_those_of_the_rows(policy):
    request = MixedRequest([[1], [1]], [1.0, math.inf], 4000, (), branch_rule="random", share=0.3, seed=4)
    heads = torch.tensor(KnownCoins(request, 0).heads)
    assert abs(heads.float().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert KnownCoins(request, 1).run(Row([1])) == 0 and KnownCoins(request, 1).heads is None


def test_the_same_request_gives_the_same_rows_whatever_else_is_sampled(policy, expert):
    request = CASES["ragged-prompts"].request(rows=30)
    whole = sample_stock(policy, expert, request)
    some = slice(10, 14)
    part = replace(
        request, prompt_ids=request.prompt_ids[some], gamma=request.gamma[some], row_seeds=request.row_seeds[some]
    )
    assert sample_stock(policy, expert, part).completion_ids == whole.completion_ids[some]
    assert sample_stock(policy, expert, replace(request, seed=9, row_seeds=())).completion_ids != whole.completion_ids


def test_rows_that_are_lost_are_sampled_again(policy, expert):
    request = CASES["w-medium"].request(rows=40)
    engine, finished = EnumeratedPolicy(policy, lose=range(0, 40, 3)), []
    progress = lambda rows, tokens: finished.append((rows, tokens))
    rollout = StockSampler(engine, EnumeratedExpert(expert)).sample(request, progress)
    assert rollout.completion_ids == sample_stock(policy, expert, request).completion_ids
    assert sum(rows for rows, _ in finished) == 40
    assert sum(tokens for _, tokens in finished) == sum(map(len, rollout.completion_ids))

    class Gone(EnumeratedPolicy):
        def lost_rows(self, rows):
            return rows

    with pytest.raises(EngineError, match="40 of 40 rows could not be sampled in 5 attempts"):
        StockSampler(Gone(policy), EnumeratedExpert(expert)).sample(request)


def test_requests_that_cannot_be_sampled(policy, expert):
    request = CASES["w-medium"].request(rows=2)
    sampler = StockSampler(EnumeratedPolicy(policy), EnumeratedExpert(expert))
    with pytest.raises(ValueError, match="score_all"):
        sampler.sample(replace(request, score_all=True))
    with pytest.raises(ValueError, match="no expert"):
        StockSampler(EnumeratedPolicy(policy)).sample(request)
    with pytest.raises(SetupError, match="512"):
        sampler.sample(replace(request, max_new_tokens=600))


def test_engines_that_branch_elsewhere_are_refused(policy):
    engine = EnumeratedPolicy(policy)
    check_branching(engine, engine.run, 4, "The engine")

    class Deaf(EnumeratedPolicy):
        """A server without the processor ignores what it does not know."""

        async def segment(self, request, row, prefix, limit, truncation):
            return await super().segment(
                replace(request, gamma=[math.inf] * len(request.gamma)), row, prefix, limit, 0
            )

    class Late(EnumeratedPolicy):
        """Coins of another position."""

        async def segment(self, request, row, prefix, limit, truncation):
            shifted = replace(request, row_seeds=tuple(seed + 1 for seed in request.row_seeds))
            return await super().segment(shifted, row, prefix, limit, truncation)

    for broken in (Deaf(policy), Late(policy)):
        with pytest.raises(SetupError, match="does not branch where it should"):
            check_branching(broken, broken.run, 4, "The engine")
