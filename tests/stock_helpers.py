"""Engines of policy and expert that answer from enumerated distributions, for rows on stock engines without vLLM."""

import asyncio
import math
import random
from contextlib import nullcontext

import torch

from mentor_trl.objective import branch_weight, near_sentence_end
from mentor_trl.objective.coins import coin_uniforms, request_seed
from mentor_trl.rollout.stock.stock_rows import Segment
from mentor_trl.rollout.stock.stock_sampler import StockSampler
from statistics_helpers import forward_logps


class Distributions:
    """Next-token log-probabilities of a model, by temperature and prefix."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def __call__(self, prefix: list[int], temperature: float) -> list[float]:
        key = temperature, tuple(prefix)
        if key not in self.known:
            self.known[key] = forward_logps(self.model, torch.tensor([prefix]), temperature)[0, -1].tolist()
        return self.known[key]


def draw(draws: random.Random, logps: list[float]) -> int:
    return draws.choices(range(len(logps)), [math.exp(logp) for logp in logps])[0]


class EnumeratedPolicy:
    """A policy's engine with the processor's rules; `lose` names rows that are lost at their first try."""

    info = {"max_model_len": 512}

    def __init__(self, model, lose=()):
        self.distribution, self.lose, self.asked = Distributions(model), set(lose), []

    def session(self):
        return nullcontext()

    def deal(self, request, rows):
        pass

    def run(self, call):
        return asyncio.run(call())

    def lost_rows(self, rows):
        return []

    async def segment(self, request, row, prefix, limit, truncation):
        self.asked.append((row, list(prefix)))
        if row in self.lose and len(prefix) > len(request.prompt_ids[row]):
            self.lose.remove(row)
            return None
        await asyncio.sleep(0)
        draws = random.Random(request_seed(request.row_seeds[row], len(prefix), "policy"))
        ids, logps, prefix = [], [], list(prefix)
        while len(ids) < limit:
            p = torch.tensor(self.distribution(prefix, request.temperature))
            recent = torch.tensor(prefix[-request.span :])
            near = near_sentence_end(recent, torch.tensor(request.sentence_ids or [-9]))
            entropy = torch.special.entr(p.exp()).sum()
            w = branch_weight(entropy, request.gamma[row], request.branch_rule, request.share, near).float()
            if coin_uniforms(torch.tensor(request.row_seeds[row]), torch.tensor(len(prefix))) < w:
                return Segment(ids, logps, True)
            token = draw(draws, p.tolist())
            ids, logps, prefix = [*ids, token], [*logps, p[token].item()], [*prefix, token]
            if token in request.stop_token_ids:
                break
        return Segment(ids, logps, False)


class EnumeratedExpert:
    """An expert that speaks."""

    max_length = 512

    def __init__(self, model):
        self.distribution, self.asked = Distributions(model), []

    async def speak(self, prefix_ids, count, temperature, stop_token_ids, row_seed, truncation):
        self.asked.append((len(prefix_ids), count))
        await asyncio.sleep(0)
        draws = random.Random(request_seed(row_seed, len(prefix_ids), "expert"))
        ids, logps = [], []
        while len(ids) < count:
            s = self.distribution([*prefix_ids, *ids], temperature)
            token = draw(draws, s)
            ids, logps = [*ids, token], [*logps, s[token]]
            if token in stop_token_ids:
                break
        return ids, logps


def sample_stock(policy, expert, request):
    with StockSampler(EnumeratedPolicy(policy), EnumeratedExpert(expert)).session() as session:
        return session.sample(request)
