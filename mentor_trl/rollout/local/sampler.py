r"""
In-process engine: speculative sampling from the mixed policy with transformers models.

In a round the policy drafts up to K tokens a row, each with its entropy, weight w and coin z ~ Bernoulli(w). Rows
without a branch point (z = 1) commit their drafts unseen. If any row has one, the expert reads the drafts of all rows
in a single pass, and only at branch points are its distribution computed and the draft coupled with it; the first
replaced draft ends the row's round. There is no bonus token: behind a draft that stands, the policy drafts the next.
So the rows are exact samples of the mixed policy at every draft length, and at w = 0 of the policy.

Each model has a key-value cache whose rows have their own lengths; a prefix enters it once.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ...experts.compatibility import check_context
from ...experts.port import Points
from ...objective import branch_weight, draw_coin, entropy_from_logps, mixture_logps
from ..types import BOOL_RECORDS, FLOAT_RECORDS, RECORDS, MixedRequest, MixedRollout, Progress
from .decoder import FIRST_RESERVE, Decoder, inference, refuse_nan
from .in_process import InProcessExpert


class LocalSampler:
    """
    Samples mixed rollouts in process.

    Args:
        expert ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Frozen expert. Without one only the plain policy (gamma = inf) can be sampled.
        num_tokens (`int`, *optional*):
            Number of ids that the tokenizer defines; the expert never emits an id from there on.
        rollout_batch_size (`int`, *optional*, defaults to `64`):
            Rows sampled at once. Finished rows are replaced by waiting ones.
        draft_length (`int`, *optional*, defaults to `8`):
            Tokens the policy drafts between two consultations of the expert.
        adaptive_draft_length (`bool`, *optional*, defaults to `False`):
            Whether to choose the draft length, up to `draft_length`, from the acceptance measured in the request.

    Example:
    ```python
    sampler = LocalSampler(expert)
    with sampler.session(policy) as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    def __init__(
        self,
        expert=None,
        num_tokens: int | None = None,
        rollout_batch_size: int = 64,
        draft_length: int = 8,
        adaptive_draft_length: bool = False,
    ):
        self.expert = expert
        self.num_tokens = num_tokens
        self.rollout_batch_size = rollout_batch_size
        self.draft_length = draft_length
        self.adaptive_draft_length = adaptive_draft_length

    @contextmanager
    def session(
        self,
        policy,
        autocast: Callable[[], AbstractContextManager] | None = None,
        float32_head: bool = False,
    ) -> Iterator["LocalSession"]:
        """
        Hold the policy's current weights. Requests inside share the key-value caches of their prompts, which are freed
        on exit. Dropout is off inside, and the modules' modes are restored on exit.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Policy, not wrapped for distribution.
            autocast (`Callable[[], AbstractContextManager]`, *optional*):
                Makes the mixed-precision context of the trainer's forward passes.
            float32_head (`bool`, *optional*, defaults to `False`):
                Whether the policy's LM head runs in float32 (TRL's `cast_lm_head_to_fp32`).
        """
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(inference(policy))
            if self.expert is not None:
                stack.enter_context(inference(self.expert))
            yield LocalSession(self, policy, autocast, float32_head)


class LocalSession:
    """What [`LocalSampler.session`] yields."""

    def __init__(self, sampler: LocalSampler, policy, autocast, float32_head: bool):
        self.sampler = sampler
        self.policy = Decoder(policy, autocast=autocast, float32_head=float32_head)
        self.expert = None
        if sampler.expert is not None:
            self.expert = InProcessExpert(sampler.expert, self.policy.vocab_size, sampler.num_tokens, autocast)

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """
        Sample a request.

        Args:
            request ([`MixedRequest`]):
                Rows to sample.

        Returns:
            [`MixedRollout`], in the order of the request.

        Raises:
            [`SetupError`]: if a row does not fit the context of a model.
            `ValueError`: if mixed rows are asked for without an expert,
            or if a model's logits are NaN.
        """
        if not request.plain and self.expert is None:
            raise ValueError("The request has mixed rows (gamma < inf), and the sampler has no expert.")
        lengths = [len(ids) for ids in request.prompt_ids]
        check_context(lengths, request.max_new_tokens, self.policy.max_length, "the policy's")
        if not request.plain:
            check_context(lengths, request.max_new_tokens, self.expert.decoder.max_length, "the expert's")
        return _Run(self, request).run()


@dataclass
class _Draft:
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


class _Run:
    """
    State of one request. Slots 0 to `active - 1` hold rows in progress; `size (S,)` counts the tokens of each, prompt
    included. Before a round the policy's cache holds all of them but the last, and the expert's at most as many.
    """

    def __init__(self, session: LocalSession, request: MixedRequest):
        self.policy, self.expert, self.sampler = session.policy, session.expert, session.sampler
        self.request = request
        self.device = device = self.policy.device
        self.generator = torch.Generator(device).manual_seed(request.seed)
        self.stop = torch.tensor(request.stop_token_ids, dtype=torch.long, device=device)
        self.waiting = deque(range(len(request.prompt_ids)))
        slots = min(len(request.prompt_ids), self.sampler.rollout_batch_size)
        longest = max(map(len, request.prompt_ids), default=0)
        width = longest + request.max_new_tokens + self.sampler.draft_length

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
        self.policy.cache.reserve(min(width, FIRST_RESERVE), slots, bound=width)
        if self.expert is not None:
            self.expert.begin(slots, width, self.device)
        self._admit(range(min(len(self.waiting), slots)))
        while self.active:
            draft = self._draft(self._draft_length())
            self.stats["drafted"] += int(draft.length.sum())
            consulted = self.expert is not None and bool(self._asked(draft).any())
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
            if self.expert is not None:
                self.expert.admit(slot, prompt)
            if slot < self.active:
                self.rows[slot], self.sizes[slot] = row, len(prompt)
            else:
                self.rows.append(row)
                self.sizes.append(len(prompt))
        self.policy.prefill(slots, prompts)

    def _draft_length(self) -> int:
        length, tokens = self.sampler.draft_length, self.stats["tokens"]
        left = max(
            len(self.request.prompt_ids[row]) + self.request.max_new_tokens - size
            for row, size in zip(self.rows, self.sizes, strict=True)
        )
        if self.sampler.adaptive_draft_length and self.expert is not None and tokens >= 64:
            cost = self.expert.decoder.num_parameters / self.policy.num_parameters
            length = best_draft_length(1.0 - self.stats["replaced"] / tokens, length, cost)
        return min(length, left)

    def _draft(self, steps: int) -> _Draft:
        """Let the policy draft `steps` tokens a row, or up to a row's stop token or length limit."""
        B, longest = self.active, max(self.sizes)
        size, limit = self.size[:B], self.start[:B] + self.request.max_new_tokens
        last = self.tokens[:B].gather(1, size.unsqueeze(1) - 1)
        length = torch.zeros_like(size)
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        columns: list[tuple[torch.Tensor, ...]] = []
        hidden = []
        for step in range(steps):
            state = self.policy.forward(last, (size + length - 1).unsqueeze(1), B, longest + step)[:, 0]
            hidden.append(state)
            token, logp, entropy = self._sample(state)
            weight = branch_weight(entropy, self.gamma[:B], self.request.branch_rule, self.request.share)
            columns.append((token, logp, entropy, weight, draw_coin(weight, self.generator)))
            length = length + alive
            alive = alive & ~torch.isin(token, self.stop) & (size + length < limit)
            last = torch.where(alive, token, last[:, 0]).unsqueeze(1)
        tokens, logps, entropies, weights, coins = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        unknown = torch.full_like(logps, torch.nan)
        replaced = torch.zeros_like(coins)
        return _Draft(tokens, logps, entropies, weights, coins, hidden, length, unknown, replaced)

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

    def _asked(self, draft: _Draft) -> torch.Tensor:
        asked = draft.coins | (draft.weights > 0.0) if self.request.score_all else draft.coins
        return asked & draft.valid

    def _consult(self, draft: _Draft) -> None:
        """Let the expert speak at branch points, and cut each row behind its first replaced draft."""
        B = self.active
        row, step = self._asked(draft).nonzero(as_tuple=True)
        steps = torch.arange(draft.tokens.size(1), device=self.device)
        self.tokens[:B].scatter_(1, self.size[:B].unsqueeze(1) + steps, draft.tokens)
        hidden = torch.stack(draft.hidden, 1)
        points = Points(
            tokens=self.tokens,
            size=self.size[:B],
            length=draft.length,
            row=row,
            step=step,
            branch=draft.coins[row, step],
            draft=draft.tokens[row, step],
            policy_logps=lambda chunk: self._logps(hidden[row[chunk], step[chunk]]),
            temperature=self.request.temperature,
            generator=self.generator,
        )
        spoken = self.expert.consult(points)
        draft.tokens[row, step], draft.replaced[row, step] = spoken.tokens, spoken.replaced
        draft.expert_logps[row, step] = spoken.expert_logps
        draft.logps[row, step] = torch.where(spoken.replaced, spoken.logps, draft.logps[row, step])
        lost = draft.replaced.any(1)
        draft.length = torch.where(lost, draft.replaced.int().argmax(1) + 1, draft.length)

    def _commit(self, draft: _Draft, consulted: bool) -> list[int]:
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
            self.expert.committed(self.size[:B])
        last = draft.tokens.gather(1, draft.length.unsqueeze(1) - 1).squeeze(1)
        ended = torch.isin(last, self.stop) | (self.size[:B] - self.start[:B] == self.request.max_new_tokens)
        lengths, ended = draft.length.tolist(), ended.tolist()
        self.sizes = [size + length for size, length in zip(self.sizes, lengths, strict=True)]
        self.stats["tokens"] += sum(lengths)
        self.stats["replaced"] += int(draft.replaced[row, step].sum())
        self.stats["rounds"] += B
        self.stats["batch_rounds"] += 1
        self.stats["expert_rounds"] += int(consulted)
        return [slot for slot in range(B) if ended[slot]]

    def _retire(self, slots: list[int]) -> None:
        """Store finished rows and give their slots to waiting rows, or close the gaps with the last rows."""
        for slot in slots:
            first, last = len(self.request.prompt_ids[self.rows[slot]]), self.sizes[slot]
            stored = {name: values[slot, : last - first].to("cpu", copy=True) for name, values in self.records.items()}
            self.done[self.rows[slot]] = {"tokens": self.tokens[slot, first:last].to("cpu", copy=True), **stored}
        refilled = slots[: len(self.waiting)]
        self._admit(refilled)
        self._close(slots[len(refilled) :])

    def _close(self, slots: list[int]) -> None:
        """Fill the gaps that finished rows leave with the last rows, so that the active ones stay in front."""
        if not slots:
            return
        left = self.active - len(slots)
        targets = [slot for slot in slots if slot < left]
        sources = [slot for slot in range(left, self.active) if slot not in slots]
        if targets:
            length = max(self.sizes[slot] for slot in sources)
            self.policy.move(sources, targets, length)
            if self.expert is not None:
                self.expert.move(sources, targets, length)
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
