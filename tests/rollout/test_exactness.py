"""
The rows of every engine against the exact distribution of the mixed policy, enumerated by plain forward passes.

Nothing here knows how an engine works: a new one is added to `statistics_helpers.ENGINES`.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch

from mentor_trl.objective import correction_weights
from mentor_trl.rollout import MixedRequest
from statistics_helpers import ENGINES, Tree, chi_square, labelled, make_peaked_model, misfit, project, sequences


INF = math.inf
ROWS = 2000
EOS = 0


@pytest.fixture(scope="module")
def policy():
    return make_peaked_model(seed=0)


@pytest.fixture(scope="module")
def expert():
    return make_peaked_model(seed=1)


@pytest.fixture(params=ENGINES)
def sample(request):
    return ENGINES[request.param]


@dataclass
class Case:
    """Rows of a request are dealt to `groups` of (prompt, gamma) in turn."""

    groups: list[tuple[list[int], float]]
    options: dict = field(default_factory=dict)
    between: bool = True  # w is neither 0 nor 1, so rows are neither the policy's nor the expert's

    def request(self, rows: int = ROWS, **options) -> MixedRequest:
        dealt = [self.groups[row % len(self.groups)] for row in range(rows)]
        settings = {"max_new_tokens": 4, "stop_token_ids": (EOS,), "seed": 1, **self.options, **options}
        return MixedRequest([prompt for prompt, _ in dealt], [gamma for _, gamma in dealt], **settings)

    def trees(self, policy, expert, request: MixedRequest, length: int | None = None) -> list[Tree]:
        return [Tree(policy, expert, request, row, length) for row in range(len(self.groups))]

    def split(self, values: list) -> list[list]:
        return [values[group :: len(self.groups)] for group in range(len(self.groups))]


PROMPT = [3, 1, 2]
SENTENCE_IDS = (2,)
RAGGED = [[2], [1, 3, 3, 1, 2, 1], [3, 1]]
CASES = {
    "w-0": Case([(PROMPT, INF)], between=False),
    "w-tiny": Case([(PROMPT, 50.0)], between=False),
    "w-small": Case([(PROMPT, 4.0)]),
    "w-medium": Case([(PROMPT, 2.0)]),
    "w-large": Case([(PROMPT, 1.2)]),
    "w-1": Case([(PROMPT, 1e-6)], between=False),
    "ragged-prompts": Case([(prompt, 2.0) for prompt in RAGGED]),
    "mixed-gammas": Case([(RAGGED[1], INF), (RAGGED[0], 1.5), (RAGGED[1], 3.0), (RAGGED[2], 1e-6)], between=False),
    "threshold": Case([(PROMPT, 1.1)], {"branch_rule": "threshold"}),
    "random": Case([(PROMPT, 1.0), (PROMPT, INF)], {"branch_rule": "random", "share": 0.4}, between=False),
    "always": Case([(PROMPT, 1.0), (PROMPT, INF)], {"branch_rule": "always"}, between=False),
    "sentence": Case(
        [([2], 1.0), ([1, 3, 2, 3, 1], 1.0)],
        {"branch_rule": "sentence", "share": 0.7, "span": 2, "sentence_ids": SENTENCE_IDS},
    ),
    "whole-span": Case(
        [([3, 1], 1.0), (PROMPT, 1.0)],
        {"branch_rule": "sentence", "share": 1.0, "span": 2, "sentence_ids": SENTENCE_IDS},
    ),
    "cold": Case([(PROMPT, 0.9)], {"temperature": 0.5}),
    "hot": Case([(PROMPT, 1.7)], {"temperature": 2.0}),
    "two-stop-ids": Case([(PROMPT, 2.0)], {"stop_token_ids": (0, 3)}),
    "no-stop-id": Case([(PROMPT, 2.0)], {"stop_token_ids": ()}),
    "score-all": Case([(PROMPT, 2.0)], {"score_all": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_joint_distribution_of_rows(name, sample, policy, expert):
    case = CASES[name]
    request = case.request()
    rows = case.split(sequences(sample(policy, expert, request)))
    trees = case.trees(policy, expert, request)
    assert misfit((group, tree.mixed()) for group, tree in zip(rows, trees)) <= 1.0
    if case.between:
        assert min(tree.total_variation() for tree in trees) > 0.3
        assert misfit((group, tree.policy()) for group, tree in zip(rows, trees)) > 3.0
        assert misfit((group, tree.expert()) for group, tree in zip(rows, trees)) > 3.0


def test_joint_distribution_of_the_last_tokens_of_long_rows(sample, policy, expert):
    """Several rounds at every draft length: an error that builds up shows at the end of the row."""
    case = Case([(PROMPT, 2.0)])
    request = case.request(max_new_tokens=8, stop_token_ids=(EOS,), seed=3)
    (tree,) = case.trees(policy, expert, request)
    rows = sequences(sample(policy, expert, request))
    for part in (slice(0, 3), slice(3, 6), slice(5, 8)):
        mixed = project(tree.mixed(), lambda row, part=part: row[part])
        assert misfit([([row[part] for row in rows], mixed)]) <= 1.0
    # whole rows tell the three policies apart
    assert misfit([(rows, tree.policy())]) > 3.0
    assert misfit([(rows, tree.expert())]) > 3.0


@pytest.mark.parametrize("gamma", [1.2, 4.0])
def test_joint_distribution_of_tokens_and_branch_points(gamma, sample, policy, expert):
    """(token, branch, replaced) of whole rows: coins, couplings and tokens together."""
    case = Case([(PROMPT, gamma)])
    request = case.request(max_new_tokens=3, seed=5)
    (tree,) = case.trees(policy, expert, request)
    rows = labelled(sample(policy, expert, request))
    assert misfit([(rows, tree.joint(tree.outcomes))]) <= 1.0
    # a coin that does not look at the token is told apart
    blind = tree.joint(
        lambda prefix: [
            ((y, z, False), m * (tree.w[prefix] if z else 1 - tree.w[prefix]))
            for y, m in enumerate(tree.m(prefix))
            for z in (False, True)
        ]
    )
    assert misfit([([tuple((y, z, False) for y, z, _ in row) for row in rows], blind)]) > 3.0


def test_posteriors_give_the_branch_points(sample, policy, expert):
    """Frequencies of branch given the first token, w s / m, and of replaced given branch, (1 - p / s)+."""
    case = Case([(PROMPT, 2.0)])
    request = case.request(rows=4 * ROWS, max_new_tokens=1, seed=7)
    (tree,) = case.trees(policy, expert, request)
    rows = [row[0] for row in labelled(sample(policy, expert, request))]
    p, s, w = torch.tensor(tree.p[()]), torch.tensor(tree.s[()]), tree.w[()]
    coin = w * s / ((1 - w) * p + w * s)
    replaced = (1 - p / s).clamp(min=0.0)
    for y in range(4):
        branches = [z for token, z, _ in rows if token == y]
        losses = [r for token, z, r in rows if token == y and z]
        for flags, chance in ((branches, coin[y].item()), (losses, replaced[y].item())):
            assert len(flags) > 30
            if chance == 0.0:
                assert not any(flags)
                continue
            deviation = math.sqrt(chance * (1 - chance) / len(flags))
            assert abs(sum(flags) / len(flags) - chance) < 5 * deviation


def test_records_equal_the_enumeration(sample, policy, expert):
    case = Case([(PROMPT, 2.0), (RAGGED[0], 1.0), (PROMPT, INF)])
    request = case.request(rows=300, score_all=True, temperature=1.3)
    rollout = sample(policy, expert, request)
    trees = case.trees(policy, expert, request)
    for row, ids in enumerate(rollout.completion_ids):
        tree = trees[row % 3]
        for t, y in enumerate(ids):
            prefix = tuple(ids[:t])
            w = tree.w[prefix]
            assert rollout.entropies[row, t].item() == pytest.approx(tree.entropy[prefix], abs=1e-4)
            assert rollout.weights[row, t].item() == pytest.approx(w, abs=1e-4)
            assert rollout.logps[row, t].item() == pytest.approx(math.log(tree.p[prefix][y]), abs=1e-4)
            assert rollout.mixed_logps[row, t].item() == pytest.approx(math.log(tree.m(prefix)[y]), abs=1e-4)
            if w > 0.0:
                assert rollout.expert_logps[row, t].item() == pytest.approx(math.log(tree.s[prefix][y]), abs=1e-4)
            else:
                assert rollout.expert_logps[row, t].isnan()
        for name in ("entropies", "weights", "logps", "expert_logps", "mixed_logps"):
            assert getattr(rollout, name)[row, len(ids) :].isnan().all()
        assert not (rollout.branch[row, len(ids) :].any() or rollout.replaced[row, len(ids) :].any())
    assert rollout.branch.any() and (rollout.replaced <= rollout.branch).all()
    assert torch.equal(rollout.mask.sum(1), torch.tensor([len(ids) for ids in rollout.completion_ids]))


@pytest.mark.parametrize("level", ["conditional", "mixture"])
def test_ratios_recover_the_policy_from_samples(level, sample, policy, expert):
    """One token after a fixed prompt: the weighted mean of f(y) is E_p f within the central limit theorem's bound."""
    case = Case([(PROMPT, 1.5)])
    request = case.request(rows=4 * ROWS, max_new_tokens=1, score_all=level == "mixture", seed=11)
    (tree,) = case.trees(policy, expert, request)
    rollout = sample(policy, expert, request)
    if level == "mixture":
        log_ratio, where = rollout.logps - rollout.mixed_logps, rollout.mask
    else:
        log_ratio, where = rollout.logps - rollout.expert_logps, rollout.branch
    rho = correction_weights(log_ratio, where, exponent=1.0, cap=INF)[:, 0].double()
    p, s, m, w = *(torch.tensor(x, dtype=torch.float64) for x in (tree.p[()], tree.s[()], tree.m(()))), tree.w[()]
    token = torch.tensor(rollout.completion_ids)[:, 0]
    for y in range(4):
        f = (token == y).double()
        # variance of rho f under the sampler
        second = p[y] ** 2 / m[y] if level == "mixture" else (1 - w) * p[y] + w * p[y] ** 2 / s[y]
        bound = 5 * math.sqrt((second - p[y] ** 2).item() / len(token))
        assert abs((rho * f).mean() - p[y]) < bound
    # without the weights the policy is not recovered
    assert chi_square(token.tolist(), dict(enumerate(p.tolist())))[0] > 100.0


@pytest.mark.parametrize("level", ["conditional", "mixture"])
def test_product_of_ratios_recovers_the_policy_over_sequences(level, policy, expert):
    """Enumeration over tokens and coins of a whole row: the product of its ratios turns m into p."""
    case = Case([(PROMPT, 1.5)])
    request = case.request(max_new_tokens=3)
    (tree,) = case.trees(policy, expert, request)
    truth, mixed = tree.policy(), tree.mixed()
    estimate = dict.fromkeys(truth, 0.0)
    for labels, chance in tree.joint(tree.outcomes).items():
        tokens = tuple(y for y, _, _ in labels)
        prefixes = [tokens[:t] for t in range(len(tokens))]
        p = torch.tensor([[tree.p[prefix][y] for prefix, y in zip(prefixes, tokens)]], dtype=torch.float64)
        s = torch.tensor([[tree.s[prefix][y] for prefix, y in zip(prefixes, tokens)]], dtype=torch.float64)
        m = torch.tensor([[tree.m(prefix)[y] for prefix, y in zip(prefixes, tokens)]], dtype=torch.float64)
        branch = torch.tensor([[z for _, z, _ in labels]])
        if level == "mixture":
            rho = correction_weights(p.log() - m.log(), torch.ones_like(branch), exponent=1.0, cap=INF)
        else:
            rho = correction_weights(p.log() - s.log(), branch, exponent=1.0, cap=INF)
        estimate[tokens] += chance * rho.prod().item()
    assert estimate == pytest.approx(truth, abs=1e-12)
    assert max(abs(truth[row] - mixed[row]) for row in truth) > 0.02


def test_equal_models_never_replace(sample, policy):
    """p = s: the residual is zero, every draft stands, and rows are the policy's."""
    case = Case([(PROMPT, 1.0)])
    request = case.request()
    rollout = sample(policy, policy, request)
    (tree,) = case.trees(policy, policy, request)
    assert rollout.branch.any() and not rollout.replaced.any()
    assert misfit([(sequences(rollout), tree.policy())]) <= 1.0
