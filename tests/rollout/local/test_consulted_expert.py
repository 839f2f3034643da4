"""An expert that draws its tokens itself, as one on a server does."""

import math

import pytest
import torch
from recurrent_models import make_recurrent
from test_local import check_records, make_request

from mentor_trl.errors import SetupError
from mentor_trl.experts.port import Spoken
from mentor_trl.rollout import MixedRequest
from statistics_helpers import Tree, forward_logps, labelled, make_peaked_model, misfit, sample_local, sequences


INF = math.inf


class Speaker:
    """Draws exact samples of a model's distribution after the prefixes of the points."""

    name, couples, max_length = "speaker", False, None

    def __init__(self, model):
        self.model, self.generator, self.known = model, torch.Generator().manual_seed(0), {}
        self.heard = []  # (row of the request, its seed, prefix) of each point, by call

    def logps(self, prefix, temperature):
        key = (*prefix, temperature)
        if key not in self.known:
            self.known[key] = forward_logps(self.model, torch.tensor([prefix]), temperature)[0, -1]
        return self.known[key]

    def consult(self, points):
        assert points.branch.all()
        prefixes = [points.prefix(point) for point in range(len(points.row))]
        rows = points.row.tolist()
        self.heard.append([(points.rows[r], points.row_seeds[r], tuple(p)) for r, p in zip(rows, prefixes)])
        logps = torch.stack([self.logps(prefix, points.temperature) for prefix in prefixes])
        tokens = torch.multinomial(logps.exp(), 1, generator=self.generator)
        return Spoken(tokens[:, 0], None, logps.gather(1, tokens)[:, 0].float(), None)


POLICIES = {
    "ragged": lambda size: make_peaked_model(0, size),
    "lockstep": lambda size: make_recurrent("lfm2", 0, size),
}


@pytest.mark.parametrize("draft_length", [1, 4, 8])
@pytest.mark.parametrize("kind", POLICIES)
def test_joint_distribution_of_rows(kind, draft_length):
    policy, expert = POLICIES[kind](4), make_peaked_model(1)
    prompts, gammas = [[2], [1, 3, 3, 1, 2, 1], [3, 1]], [2.0, 1.2, 4.0]
    request = MixedRequest(prompts * 700, gammas * 700, 4, (0,), seed=1, temperature=1.2)
    rollout = sample_local(policy, Speaker(expert), request, draft_length=draft_length, rollout_batch_size=1500)
    trees = [Tree(policy, expert, request, row) for row in range(3)]
    rows, marked = sequences(rollout), labelled(rollout)
    assert misfit((rows[i::3], tree.mixed()) for i, tree in enumerate(trees)) <= 1.0
    assert misfit((marked[i::3], tree.joint(tree.outcomes)) for i, tree in enumerate(trees)) <= 1.0
    assert misfit((rows[i::3], tree.policy()) for i, tree in enumerate(trees)) > 3.0
    assert misfit((rows[i::3], tree.expert()) for i, tree in enumerate(trees)) > 3.0


@pytest.mark.parametrize("kind", POLICIES)
def test_it_is_asked_once_a_round_at_the_first_branch_point_of_a_row(kind):
    policy, expert = POLICIES[kind](12), make_peaked_model(1, vocab_size=12)
    prompts = [[5, 1, 3], [7], [2, 4, 6, 8, 10, 1, 3, 5, 7], [9, 9], [3, 8, 1, 1, 6], [4]]
    request = make_request(prompts, [1.5, INF, 3.0, 2.0, INF, 4.0], 12, stop_token_ids=(3, 8))
    speaker = Speaker(expert)
    rollout = sample_local(policy, speaker, request, rollout_batch_size=4, draft_length=6)
    check_records(policy, expert, request, rollout)
    for call in speaker.heard:
        assert len({row for row, _, _ in call}) == len(call)
    points = {
        (row, request.row_seeds[row], (*prompts[row], *ids[:t]))
        for row, ids in enumerate(rollout.completion_ids)
        for t in range(len(ids))
        if rollout.branch[row, t]
    }
    heard = [point for call in speaker.heard for point in call]
    assert set(heard) == points and len(heard) == len(points) > 5
    assert rollout.stats["expert_rounds"] == len(speaker.heard)


def test_it_does_not_know_log_s_at_every_token():
    request = make_request(score_all=True)
    with pytest.raises(SetupError, match=r"The expert \(speaker\) draws its tokens itself .* `correction_level`"):
        sample_local(make_peaked_model(0, 12), Speaker(make_peaked_model(1, 12)), request)


def test_its_context_is_kept():
    speaker = Speaker(make_peaked_model(1, 12))
    speaker.max_length = 16
    with pytest.raises(SetupError, match="the expert's context of 16 tokens"):
        sample_local(make_peaked_model(0, 12), speaker, make_request(max_new_tokens=8))
    sample_local(make_peaked_model(0, 12), speaker, make_request(max_new_tokens=8, gamma=INF))
