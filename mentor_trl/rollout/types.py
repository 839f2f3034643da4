"""What every rollout engine takes and gives."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from ..experts.port import Expert


FLOAT_RECORDS = ("entropies", "weights", "logps", "expert_logps", "mixed_logps")
BOOL_RECORDS = ("branch", "replaced")
RECORDS = FLOAT_RECORDS + BOOL_RECORDS
# Called while a request is sampled, with the rows finished and the tokens committed since the last call
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MixedRequest:
    """
    Rows to sample from the mixed policy.

    Args:
        prompt_ids (`list[list[int]]`):
            Token ids of each row's prompt, without padding. Equal prompts may repeat.
        gamma (`list[float]`):
            Entropy threshold of each row, in nats; `inf` is the plain policy.
        max_new_tokens (`int`):
            Length limit of a completion, in tokens.
        stop_token_ids (`tuple[int, ...]`):
            Ids that end a completion (and are its last token).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models.
        branch_rule (`str`, *optional*, defaults to `"entropy"`):
            See [`~mentor_trl.objective.branch_weight`].
        share (`float`, *optional*, defaults to `0.0`):
            Weight of the branch rules `"random"` and `"sentence"`.
        span (`int`, *optional*, defaults to `1`), sentence_ids (`tuple[int, ...]`, *optional*):
            Of the branch rule `"sentence"`: how many first tokens of a sentence branch, and the ids behind which one
            may begin ([`~mentor_trl.objective.sentence_endings`]).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the request. The same request on the same weights gives the same rows.
        score_all (`bool`, *optional*, defaults to `False`):
            Whether log s and log m are returned at every token with w > 0 rather than at branch points only.
        row_seeds (`tuple[int, ...]`, *optional*):
            Seed of each row, below 2^62, for engines that draw each row by itself. Made from `seed` if not given.
    """

    prompt_ids: list[list[int]]
    gamma: list[float]
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    branch_rule: str = "entropy"
    share: float = 0.0
    span: int = 1
    sentence_ids: tuple[int, ...] = ()
    seed: int = 0
    score_all: bool = False
    row_seeds: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.prompt_ids) != len(self.gamma):
            raise ValueError(f"The request has {len(self.prompt_ids)} prompts and {len(self.gamma)} values of gamma.")
        for row, ids in enumerate(self.prompt_ids):
            if len(ids) == 0:
                raise ValueError(f"The prompt of row {row} has no tokens; a rollout needs at least one.")
        for row, gamma in enumerate(self.gamma):
            if not gamma > 0.0:
                raise ValueError(f"gamma of row {row} is {gamma}; it must be positive (inf for the plain policy).")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive.")
        if self.span < 1:
            raise ValueError(f"span is {self.span}; it must be at least 1.")
        if not self.row_seeds:
            words = np.random.SeedSequence(self.seed).generate_state(len(self.prompt_ids), np.uint64)
            object.__setattr__(self, "row_seeds", tuple(int(word >> np.uint64(2)) for word in words))

    @classmethod
    def merged(cls, requests: "list[MixedRequest]") -> "MixedRequest":
        """One request for the rows of several, in their order."""
        return replace(
            requests[0],
            prompt_ids=[ids for request in requests for ids in request.prompt_ids],
            gamma=[gamma for request in requests for gamma in request.gamma],
            row_seeds=tuple(seed for request in requests for seed in request.row_seeds),
        )

    @property
    def plain(self) -> bool:
        """Whether every row is of the plain policy."""
        return all(gamma == float("inf") for gamma in self.gamma)


@dataclass
class MixedRollout:
    """
    Completions and their per-token records. R rows; T is the longest completion; what lies beyond a row's completion
    is NaN or `False`. A record that the engine does not have is `None`.

    Args:
        completion_ids (`list[list[int]]`):
            Token ids of each completion, with the stop token that ended it, if any.
        logps (`torch.Tensor` of shape `(R, T)`):
            log p of the committed token, in nats. NaN at branch points that the policy's engine did not read
            (`logps_at_branches`).
        expert_logps (`torch.Tensor` of shape `(R, T)`):
            log s of the committed token; NaN where the expert was not asked.
        branch (`torch.Tensor` of shape `(R, T)`, `bool`):
            Branch points: the coin fell on the expert, and the token is an exact sample of s.
        entropies (`torch.Tensor` of shape `(R, T)`, *optional*):
            Policy entropy H in nats before each token.
        weights (`torch.Tensor` of shape `(R, T)`, *optional*):
            Weight w of the expert.
        mixed_logps (`torch.Tensor` of shape `(R, T)`, *optional*):
            log m of the committed token; NaN where the expert was not asked and w > 0.
        replaced (`torch.Tensor` of shape `(R, T)`, `bool`, *optional*):
            Branch points whose token differs from the policy's draft.
        stats (`dict[str, float]`):
            Counts of the sampling: `tokens`, `drafted` (tokens), `rounds` (of a row), `batch_rounds` and
            `expert_rounds` (those in which the expert ran), `seconds`.
    """

    completion_ids: list[list[int]]
    logps: torch.Tensor
    expert_logps: torch.Tensor
    branch: torch.Tensor
    entropies: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    mixed_logps: torch.Tensor | None = None
    replaced: torch.Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def mask(self) -> torch.Tensor:
        """`(R, T)` `bool`: which positions hold a token."""
        lengths = torch.tensor([len(ids) for ids in self.completion_ids], device=self.logps.device)
        return torch.arange(self.logps.size(1), device=self.logps.device) < lengths.unsqueeze(1)

    @property
    def logps_at_branches(self) -> bool:
        """Whether log p is known at branch points, too."""
        return not bool(self.logps[self.branch].isnan().any())

    def policy_logps(self) -> list[list[float | None]]:
        """
        Log-probabilities as TRL's engine-mismatch correction takes them: log p of tokens that the policy sampled, and
        `None` (no correction) at branch points, whose ratio is MENTOR's own.
        """
        return [
            [None if expert else logp for logp, expert in zip(logps[: len(ids)], branch)]
            for ids, logps, branch in zip(self.completion_ids, self.logps.tolist(), self.branch.tolist())
        ]

    @property
    def records(self) -> dict[str, torch.Tensor]:
        """The records that there are, by name."""
        found = {name: getattr(self, name) for name in RECORDS}
        return {name: values for name, values in found.items() if values is not None}

    def padded(self, length: int) -> "MixedRollout":
        """The same rollout with records of at least `length` positions."""
        extra = max(length - self.logps.size(1), 0)
        records = {}
        for name, values in self.records.items():
            fill = torch.nan if values.is_floating_point() else False
            records[name] = torch.nn.functional.pad(values, (0, extra), value=fill)
        return replace(self, **records)

    def split(self, counts: list[int]) -> list["MixedRollout"]:
        """Rollouts of `counts` rows each. Every part has its own tokens, and the time of the whole."""
        parts, first = [], 0
        for count in counts:
            rows = slice(first, first + count)
            ids = self.completion_ids[rows]
            longest = max(map(len, ids), default=0)
            records = {name: values[rows, :longest] for name, values in self.records.items()}
            whole = {
                name: self.stats[name] for name in ("seconds", "batch_rounds", "expert_rounds") if name in self.stats
            }
            stats = {"tokens": sum(map(len, ids)), **whole}
            if "replaced" in records:
                stats["replaced"] = int(records["replaced"].sum())
            parts.append(MixedRollout(ids, **records, stats=stats))
            first += count
        return parts


class MixedSampler(Protocol):
    """Samples requests. Every engine draws from the same distribution; they differ in where the models live."""

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """Sample a request."""
        ...


class Engine(Protocol):
    """
    What a trainer samples with.

    Args:
        expert (`~mentor_trl.experts.port.Expert`, *optional*):
            The expert where it is at hand for other questions; `None` where the engine alone can ask it.
        expert_name (`str`, *optional*):
            Model id or folder of the expert.
        stop_token_ids (`list[int]`):
            Ids that end a completion, of policy and expert alike.
        remote (`bool`):
            Whether a request may fail because another process does.
        released (`bool`):
            Whether the expert is gone.
    """

    expert: Expert | None
    expert_name: str | None
    stop_token_ids: list[int]
    remote: bool
    released: bool

    def session(self) -> AbstractContextManager[MixedSampler]:
        """Hold the policy's current weights: requests made inside share what was computed for their prompts."""
        ...

    def release_expert(self) -> None:
        """The expert is not needed any more."""
        ...

    def park_expert(self) -> None:
        """The expert is not needed until the next session."""
        ...


def mixed_rows(first: int, count: int, num_generations: int, num_mixed: int) -> torch.Tensor:
    """
    Which rows of a slice of the global batch are mixed: the last `num_mixed` of each group, wherever groups begin.

    Args:
        first (`int`):
            Global index of the slice's first row.
        count (`int`):
            Rows of the slice.
        num_generations (`int`):
            Rows of a group.
        num_mixed (`int`):
            Mixed rows of a group.

    Returns:
        `torch.Tensor` of shape `(count,)`, `bool`.

    Example:
    ```python
    >>> mixed_rows(2, 4, num_generations=4, num_mixed=2)
    tensor([ True,  True, False, False])
    ```
    """
    return (torch.arange(first, first + count) % num_generations) >= num_generations - num_mixed
