"""One request: rows in progress, rounds of drafts, and what becomes of them."""

import math
import time
from collections import deque
from dataclasses import dataclass

import torch

from ...experts.port import Expert, Points, Spoken
from ...objective import branch_weight, draw_coin, entropy_from_logps, mixture_logps, near_sentence_end
from ..types import BOOL_RECORDS, FLOAT_RECORDS, RECORDS, MixedRequest, MixedRollout
from .decoder import FIRST_RESERVE, Decoder, refuse_nan
from .expert_rows import ExpertRows, closed_gaps


@dataclass(frozen=True)
class Drafting:
    """How many rows are in progress at once, and how many tokens of each are drafted in a round."""

    rollout_batch_size: int
    draft_length: int
    adaptive_draft_length: bool


@dataclass
class Draft:
    """Drafts of a round, `(B, K)` each; `length (B,)` of them count, and after the expert's verdict are committed."""

    tokens: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    weights: torch.Tensor
    coins: torch.Tensor
    hidden: list[torch.Tensor]
    length: torch.Tensor
    expert_logps: torch.Tensor
    replaced: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        steps = torch.arange(self.tokens.size(1), device=self.tokens.device)
        return steps < self.length.unsqueeze(1)


class RequestRun:
    """
    State of one request. Slots 0 to `active - 1` hold rows in progress; `size (S,)` counts the tokens of each, prompt
    included. Before a round the policy's cache holds all of them but the last, and the expert's at most as many.

    Args:
        policy ([`Decoder`]):
            Policy.
        expert ([`~mentor_trl.experts.port.Expert`], *optional*):
            Expert of the mixed rows.
        request ([`MixedRequest`]):
            Rows to sample.
        settings ([`Drafting`]):
            How many rows and tokens at once.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with rows finished and tokens committed.
    """

    def __init__(self, policy: Decoder, expert: Expert | None, request: MixedRequest, settings: Drafting, progress):
        self.policy, self.expert, self.request = policy, expert, request
        self.settings, self.progress = settings, progress
        self.device = device = self.policy.device
        self.generator = torch.Generator(device).manual_seed(request.seed)
        self.stop = torch.tensor(request.stop_token_ids, dtype=torch.long, device=device)
        self.waiting = deque(range(len(request.prompt_ids)))
        self.sentence_ids = torch.tensor(request.sentence_ids, dtype=torch.long, device=device)
        slots = min(len(request.prompt_ids), settings.rollout_batch_size)
        longest = max(map(len, request.prompt_ids), default=0)
        width = longest + request.max_new_tokens + settings.draft_length
        mixed = sum(gamma < math.inf for gamma in request.gamma)
        self.mixed = ExpertRows(expert, min(mixed, slots), width, device)
        reader = self.mixed.reader
        self.couples = expert is None or expert.couples
        # Rows that cannot be rolled back take one token at a time, and all of them begin at once
        self.lockstep = policy.lockstep or (reader is not None and reader.decoder.lockstep)

        self.tokens = torch.zeros((slots, width), dtype=torch.long, device=device)
        self.size = torch.ones(slots, dtype=torch.long, device=device)
        self.start = torch.ones(slots, dtype=torch.long, device=device)
        self.gamma = torch.ones(slots, device=device)
        self.rows: list[int] = []
        self.sizes: list[int] = []
        shape = (slots, request.max_new_tokens)
        self.records = {name: torch.zeros(shape, device=device) for name in FLOAT_RECORDS}
        self.records |= {name: torch.zeros(shape, dtype=torch.bool, device=device) for name in BOOL_RECORDS}
        self.done: dict[int, dict[str, torch.Tensor]] = {}
        self.stats = dict.fromkeys(("tokens", "replaced", "drafted", "rounds", "batch_rounds", "expert_rounds"), 0)

    @property
    def active(self) -> int:
        return len(self.rows)

    def run(self) -> MixedRollout:
        started = time.perf_counter()
        slots, width = self.tokens.shape
        self.policy.reserve(min(width, FIRST_RESERVE), slots, bound=width)
        self._admit(range(slots))
        while self.active:
            draft = self._draft(self._draft_length())
            self.stats["drafted"] += int(draft.length.sum())
            consulted = bool(self.mixed.slots) and bool(self._asked(draft).any())
            if consulted:
                self._consult(draft)
            self._retire(self._commit(draft, consulted))
        return self._collect(time.perf_counter() - started)

    def _admit(self, slots) -> None:
        """Put waiting rows into slots."""
        slots = [slot for slot, _ in zip(slots, range(len(self.waiting)), strict=False)]
        if not slots:
            return
        prompts = []
        for slot in slots:
            row = self.waiting.popleft()
            prompt = tuple(self.request.prompt_ids[row])
            prompts.append(prompt)
            self.tokens[slot, : len(prompt)] = torch.tensor(prompt, device=self.device)
            self.size[slot] = self.start[slot] = len(prompt)
            self.gamma[slot] = self.request.gamma[row]
            if self.request.gamma[row] < math.inf:
                self.mixed.admit(slot, prompt)
            if slot < self.active:
                self.rows[slot], self.sizes[slot] = row, len(prompt)
            else:
                self.rows.append(row)
                self.sizes.append(len(prompt))
        self.policy.prefill(slots, prompts)

    def _draft_length(self) -> int:
        if self.lockstep:
            return 1
        length, tokens = self.settings.draft_length, self.stats["tokens"]
        left = max(
            len(self.request.prompt_ids[row]) + self.request.max_new_tokens - size
            for row, size in zip(self.rows, self.sizes, strict=True)
        )
        if self.settings.adaptive_draft_length and self.mixed.reader is not None and tokens >= 64:
            cost = self.mixed.reader.decoder.num_parameters / self.policy.num_parameters
            length = best_draft_length(1.0 - self.stats["replaced"] / tokens, length, cost)
        return min(length, left)

    def _draft(self, steps: int) -> Draft:
        """Let the policy draft `steps` tokens a row, or up to a row's stop token or length limit."""
        B, longest = self.active, max(self.sizes)
        size, limit = self.size[:B], self.start[:B] + self.request.max_new_tokens
        last = self.tokens[:B].gather(1, size.unsqueeze(1) - 1)
        length = torch.zeros_like(size)
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        columns: list[tuple[torch.Tensor, ...]] = []
        hidden = []
        recent = self._recent() if self.request.branch_rule == "sentence" else None
        for step in range(steps):
            state = self.policy.forward(last, (size + length - 1).unsqueeze(1), B, longest + step)[:, 0]
            hidden.append(state)
            token, logp, entropy = self._sample(state)
            weight = self._weight(entropy, recent)
            coin = draw_coin(weight, self.generator)
            columns.append((token, logp, entropy, weight, coin))
            length = length + alive
            alive = alive & ~torch.isin(token, self.stop) & (size + length < limit)
            if not self.couples:
                alive = alive & ~coin
                if not alive.any():
                    break
            if recent is not None:
                recent = torch.cat([recent[:, 1:], token.unsqueeze(1)], 1)
            last = torch.where(alive, token, last[:, 0]).unsqueeze(1)
        tokens, logps, entropies, weights, coins = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        unknown = torch.full_like(logps, torch.nan)
        replaced = torch.zeros_like(coins)
        return Draft(tokens, logps, entropies, weights, coins, hidden, length, unknown, replaced)

    def _recent(self) -> torch.Tensor:
        """The last `span` ids of each row, `(B, span)`; -1 where there is none."""
        B = self.active
        at = self.size[:B].unsqueeze(1) - self.request.span + torch.arange(self.request.span, device=self.device)
        return self.tokens[:B].gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)

    def _weight(self, entropy: torch.Tensor, recent: torch.Tensor | None) -> torch.Tensor:
        near = None if recent is None else near_sentence_end(recent, self.sentence_ids)
        request = self.request
        return branch_weight(entropy, self.gamma[: self.active], request.branch_rule, request.share, near)

    def _sample(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw y ~ p: tokens, log p(y) and entropies, `(B,)` each, from hidden states `(B, D)`."""
        parts = []
        for chunk in hidden.split(self.policy.rows_per_chunk):
            logps = self._logps(chunk)
            entropy = entropy_from_logps(logps)
            refuse_nan(entropy, "policy")
            token = torch.multinomial(logps.exp(), 1, generator=self.generator)
            parts.append((token.squeeze(1), logps.gather(1, token).squeeze(1), entropy))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _logps(self, hidden: torch.Tensor) -> torch.Tensor:
        """The policy's log-probabilities `(N, V)` after hidden states `(N, D)`."""
        return (self.policy.logits(hidden) / self.request.temperature).log_softmax(-1)

    def _asked(self, draft: Draft) -> torch.Tensor:
        asked = draft.coins | (draft.weights > 0.0) if self.request.score_all else draft.coins
        return asked & draft.valid

    def _consult(self, draft: Draft) -> None:
        """Let the expert speak at branch points, and cut each row behind its first replaced draft."""
        B, members = self.active, self.mixed.index
        row, step = self._asked(draft)[members].nonzero(as_tuple=True)
        slot = members[row]
        steps = torch.arange(draft.tokens.size(1), device=self.device)
        self.tokens[:B].scatter_(1, self.size[:B].unsqueeze(1) + steps, draft.tokens)
        hidden = torch.stack(draft.hidden, 1)
        rows = [self.rows[member] for member in self.mixed.slots]
        points = Points(
            tokens=self.tokens[members],
            size=self.size[members],
            length=draft.length[members],
            row=row,
            step=step,
            branch=draft.coins[slot, step],
            draft=draft.tokens[slot, step],
            policy_logps=lambda chunk: self._logps(hidden[slot[chunk], step[chunk]]),
            temperature=self.request.temperature,
            generator=self.generator,
            rows=rows,
            row_seeds=[self.request.row_seeds[row] for row in rows],
        )
        spoken = self.expert.consult(points)
        if not self.couples:
            spoken = self._judged(spoken, points)
        draft.tokens[slot, step], draft.replaced[slot, step] = spoken.tokens, spoken.replaced
        draft.expert_logps[slot, step] = spoken.expert_logps
        # At a draft that stands log p is known
        known = spoken.replaced if self.couples else torch.ones_like(spoken.replaced)
        draft.logps[slot, step] = torch.where(known, spoken.logps, draft.logps[slot, step])
        lost = draft.replaced.any(1)
        draft.length = torch.where(lost, draft.replaced.int().argmax(1) + 1, draft.length)

    def _judged(self, spoken: Spoken, points: Points) -> Spoken:
        """
        What an expert said that does not couple, with log p of its tokens, and whether a coupled draft would have been
        replaced by them: drawn from its probability given the token, (1 - p / s)+.
        """
        tokens = spoken.tokens.to(self.device)
        logs = spoken.expert_logps.to(self.device, torch.float32)
        parts = []
        for chunk in torch.arange(len(tokens), device=self.device).split(self.policy.rows_per_chunk):
            part = slice(int(chunk[0]), int(chunk[-1]) + 1)
            parts.append(points.policy_logps(part).gather(1, tokens[part].unsqueeze(1)).squeeze(1))
        logps = torch.cat(parts)
        replaced = draw_coin(-torch.expm1((logps - logs).clamp(max=0.0)), self.generator)
        return Spoken(tokens, logps, logs, replaced)

    def _commit(self, draft: Draft, consulted: bool) -> list[int]:
        """Append the drafts that stand; return the slots that are done."""
        B = self.active
        row, step = draft.valid.nonzero(as_tuple=True)
        at = (self.size - self.start)[row] + step
        new = {
            "entropies": draft.entropies,
            "weights": draft.weights,
            "logps": draft.logps,
            "expert_logps": draft.expert_logps,
            "mixed_logps": mixture_logps(draft.logps, draft.expert_logps, draft.weights),
            "branch": draft.coins,
            "replaced": draft.replaced,
        }
        for name, values in new.items():
            self.records[name][row, at] = values[row, step]
        self.tokens[row, self.start[row] + at] = draft.tokens[row, step]
        self.size[:B] += draft.length
        if consulted:
            self.mixed.committed(self.size)
        last = draft.tokens.gather(1, draft.length.unsqueeze(1) - 1).squeeze(1)
        ended = torch.isin(last, self.stop) | (self.size[:B] - self.start[:B] == self.request.max_new_tokens)
        lengths, ended = draft.length.tolist(), ended.tolist()
        self.sizes = [size + length for size, length in zip(self.sizes, lengths, strict=True)]
        self.stats["tokens"] += sum(lengths)
        self.stats["replaced"] += int(draft.replaced[row, step].sum())
        self.stats["rounds"] += B
        self.stats["batch_rounds"] += 1
        self.stats["expert_rounds"] += int(consulted)
        done = [slot for slot in range(B) if ended[slot]]
        if self.progress is not None:
            self.progress(len(done), sum(lengths))
        return done

    def _retire(self, slots: list[int]) -> None:
        """Store finished rows and give their slots to waiting rows, or close the gaps with the last rows."""
        for slot in slots:
            first, last = len(self.request.prompt_ids[self.rows[slot]]), self.sizes[slot]
            stored = {name: values[slot, : last - first].to("cpu", copy=True) for name, values in self.records.items()}
            self.done[self.rows[slot]] = {"tokens": self.tokens[slot, first:last].to("cpu", copy=True), **stored}
        self.mixed.leave(slots)
        refilled = [] if self.lockstep else slots[: len(self.waiting)]
        self._admit(refilled)
        self.mixed.close(self.sizes)
        self._close(slots[len(refilled) :])
        if not self.active:
            self._admit(range(len(self.tokens)))

    def _close(self, slots: list[int]) -> None:
        """Fill the gaps that finished rows leave with the last rows, so that the active ones stay in front."""
        if not slots:
            return
        left = self.active - len(slots)
        sources, targets = closed_gaps(self.active, slots)
        if targets:
            length = max(self.sizes[slot] for slot in sources)
            self.policy.move(sources, targets, length)
            self.mixed.moved(sources, targets)
            for state in (self.tokens, self.size, self.start, self.gamma, *self.records.values()):
                state[targets] = state[sources]
            for state in (self.rows, self.sizes):
                for source, target in zip(sources, targets):
                    state[target] = state[source]
        del self.rows[left:], self.sizes[left:]

    def _collect(self, seconds: float) -> MixedRollout:
        rows = [self.done[row] for row in range(len(self.request.prompt_ids))]
        longest = max((len(row["tokens"]) for row in rows), default=0)
        padded = {}
        for name in RECORDS:
            is_float = name in FLOAT_RECORDS
            padded[name] = torch.full((len(rows), longest), torch.nan if is_float else False)
            for i, row in enumerate(rows):
                padded[name][i, : len(row[name])] = row[name]
        ids = [row["tokens"].tolist() for row in rows]
        return MixedRollout(completion_ids=ids, **padded, stats={**self.stats, "seconds": seconds})


def best_draft_length(acceptance: float, longest: int, cost: float) -> int:
    """
    Draft length with the most committed tokens per policy step.

    Args:
        acceptance (`float`):
            Share of drafted tokens that stand, a.
        longest (`int`):
            Largest draft length.
        cost (`float`):
            Policy steps that an expert pass costs, e.

    Returns:
        `int`: the K of 1 to `longest` that maximizes (1 - a^K) / (1 - a) / (K + e).

    Example:
    ```python
    >>> best_draft_length(0.99, 8, 1.0), best_draft_length(0.6, 8, 1.0)
    (8, 2)
    ```
    """

    def rate(length: int) -> float:
        return sum(acceptance**i for i in range(length)) / (length + cost)

    return max(range(1, longest + 1), key=rate)
