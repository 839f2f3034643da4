"""
Dynamic sampling, from [DAPO](https://huggingface.co/papers/2503.14476): groups of which nothing is learned are sampled
again with other prompts.

A round samples as many groups on every process as the one with the most such groups needs, so that all processes make
the same collective calls. A group stays on its process.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from ..config import MentorGRPOConfig
from ..objective import baseline_rows
from .batch import Credit, RolloutBatch, Scored
from .metrics import PREFIX
from .processes import Processes
from .rollout_log import RolloutRecord, collect_records, draw_rows, save_records
from .tables import BY_NAME, SINGLE, printed


SEED = 2503  # keeps the order of prompts apart from other uses of the run's seed


@dataclass(frozen=True)
class Round:
    """A process's rows that are sampled together, and what became of them."""

    inputs: list[dict[str, Any]]
    output: dict[str, Any]  # as the loss takes it
    batch: RolloutBatch
    scored: Scored
    credit: Credit


@dataclass
class Filled:
    """
    A rollout batch as the loss takes it.

    Args:
        rounds (`list[Round]`):
            The rows first sampled, and those of further rounds.
        rows (`list[tuple[int, int]]`):
            Round of each row of this process, and its place there.
        output (`dict`):
            What the loss takes.
        metrics (`dict[str, float]`):
            How it came about; the same on every process.
    """

    rounds: list[Round]
    rows: list[tuple[int, int]]
    output: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)

    def save_records(self, args: MentorGRPOConfig, step: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the records of the first `log_rollout_records` rows."""
        rows = range(min(args.log_rollout_records, len(self.rows)))
        save_records(args.output_dir, self._records(rows, step, tokenizer))

    def examples(self, args: MentorGRPOConfig, step: int, tokenizer: PreTrainedTokenizerBase) -> list[RolloutRecord]:
        """Records of the rows that `log_completions` prints."""
        count = printed(args)
        if not count:
            return []
        sources = [self.rounds[index].batch.source_names()[row] for index, row in self.rows]
        return self._records(draw_rows(sources, count, step), step, tokenizer, unrecorded=True)

    def _records(self, wanted: Iterable[int], step: int, tokenizer, unrecorded: bool = False) -> list[RolloutRecord]:
        found = []
        for index, part in enumerate(self.rounds):
            found += collect_records(
                part.batch,
                step=step,
                prompts=[row["prompt"] for row in part.inputs],
                rewards=part.scored.rewards_N[part.scored.local].tolist(),
                advantages=part.credit.advantages_N[part.scored.local].tolist(),
                weights_B_T=part.credit.weights_B_T,
                tokenizer=tokenizer,
                places={self.rows[place][1]: place for place in wanted if self.rows[place][0] == index},
                unrecorded=unrecorded,
            )
        return sorted(found, key=lambda record: record.row)


class Resampling:
    """
    Fills a rollout batch with groups of which something is learned; all processes call it together.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.
        dataset:
            Training set, of which prompts are drawn without replacement in an order of their own.
        processes ([`Processes`]):
            The run's.
        pad_token_id (`int`):
            Fills up rows of different length.
    """

    def __init__(self, args: MentorGRPOConfig, dataset: Any, processes: Processes, pad_token_id: int):
        self.rounds, self.num_generations, self.seed = args.dynamic_sampling, args.num_generations, args.seed
        self.dataset, self.processes, self.pad_token_id = dataset, processes, pad_token_id
        self.drawn = 0  # prompts looked at so far; what a checkpoint keeps

    def fill(
        self,
        first: Round,
        logs: dict[str, Any],
        again: Callable[[list[dict[str, Any]], int], tuple[Round, dict[str, Any]]],
    ) -> Filled:
        """
        The batch that was sampled first, with other groups in the place of those of which nothing is learned.

        Args:
            first (`Round`):
                That batch.
            logs (`dict`):
                Its completions table, whose rows are replaced as well.
            again (`Callable`):
                Samples other rows for the number of a round, 1 at first, and gives them with their table.
        """
        count = len(first.inputs)
        filled = Filled([first], [(0, row) for row in range(count)], first.output)
        if self.rounds == 0:
            return filled
        open_P_G = silent = self._silent(first)
        sampled, seen = open_P_G.numel(), None
        while open_P_G.any() and len(filled.rounds) <= self.rounds:
            if seen is None:
                seen = set(gather_object([repr(row["prompt"]) for row in first.inputs]))
            groups = int(open_P_G.sum(dim=1).max())
            part, table = again(self._draw(groups, seen, first.inputs[0].keys()), len(filled.rounds))
            sampled += groups * self.processes.count
            open_P_G = self._place(filled, open_P_G, part, logs, table)
        if len(filled.rounds) > 1:
            filled.output = merged(filled.rounds, filled.rows, self.pad_token_id, self.processes)
        share = lambda flags: flags.float().mean().item()
        values = {
            "rounds": float(len(filled.rounds) - 1),
            "rows": float(sampled * self.num_generations),
            "silent": share(silent),
            "left": share(open_P_G),
        }
        filled.metrics = {f"{PREFIX}resampling/{name}": value for name, value in values.items()}
        return filled

    def _silent(self, part: Round) -> torch.Tensor:
        silent = silent_groups(
            part.scored.rewards_N, part.scored.source_N != 0, part.credit.advantages_N, self.num_generations
        )
        return silent.cpu().view(self.processes.count, -1)

    def _place(self, filled: Filled, open_P_G, part: Round, logs, table) -> torch.Tensor:
        """Put groups of a round into the places that are open; gives those that are still."""
        size, good_P_K, left_P_G = self.num_generations, ~self._silent(part), open_P_G.clone()
        filled.rounds.append(part)
        moves = []
        for process, (places, found) in enumerate(zip(open_P_G, good_P_K)):
            pairs = list(zip(places.nonzero().flatten().tolist(), found.nonzero().flatten().tolist()))
            for place, group in pairs:
                left_P_G[process, place] = False
                rows = [(place * size + i, group * size + i) for i in range(size)]
                base, other = process * len(places) * size, process * len(found) * size
                moves += [(base + to, other + row) for to, row in rows]
                if process == self.processes.index:
                    for to, row in rows:
                        filled.rows[to] = (len(filled.rounds) - 1, row)
        replace_rows(logs, table, moves)
        return left_P_G

    def _draw(self, groups: int, seen: set[str], columns) -> list[dict[str, Any]]:
        """Rows of this process for so many groups. What is seen is passed over, as long as there are other prompts."""
        size, passed, indices = len(self.dataset), 0, []
        while len(indices) < groups * self.processes.count:
            index = self._next()
            prompt = repr(self.dataset[index]["prompt"])
            if prompt in seen and passed < size:
                passed += 1
                continue
            seen.add(prompt)
            indices.append(index)
        here = indices[self.processes.local(groups)]
        rows = ({name: value for name, value in self.dataset[i].items() if name in columns} for i in here)
        return [row for row in rows for _ in range(self.num_generations)]

    def _next(self) -> int:
        epoch, place = divmod(self.drawn, len(self.dataset))
        self.drawn += 1
        return int(prompt_order(self.seed, epoch, len(self.dataset))[place])


@lru_cache(maxsize=1)
def prompt_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which a seed's run draws the prompts of a training set of a size, in each pass over it."""
    return np.random.default_rng([SEED, seed, epoch]).permutation(size)


def silent_groups(
    rewards_N: torch.Tensor, guided_N: torch.Tensor, advantages_N: torch.Tensor, num_generations: int
) -> torch.Tensor:
    """
    Groups of which nothing is learned, `(N / num_generations,)` `bool`: their on-policy rewards are all equal, and no
    other row has an advantage. NaN is undefined.

    Example:
    ```python
    >>> rewards = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    >>> guided = torch.tensor([False, False, True] * 2)
    >>> silent_groups(rewards, guided, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]), num_generations=3)
    tensor([ True, False])
    ```
    """
    of_group = baseline_rows(guided_N, num_generations).view(-1, num_generations)
    rewards_G = rewards_N.view(-1, num_generations)
    known = of_group & ~rewards_G.isnan()
    low_G = rewards_G.where(known, torch.inf).amin(dim=1, keepdim=True)
    high_G = rewards_G.where(known, -torch.inf).amax(dim=1, keepdim=True)
    # The mean of equal rewards differs from them by rounding
    idle = of_group | (rewards_G == low_G) | (advantages_N.view(-1, num_generations) == 0.0)
    return (high_G <= low_G).squeeze(1) & idle.all(dim=1)


def merged(
    rounds: list[Round], rows: list[tuple[int, int]], pad_token_id: int, processes: Processes
) -> dict[str, Any]:
    """Rows of several rounds as one batch of the loss: prompts are filled up on the left, all else on the right."""
    starts = np.cumsum([0] + [len(part.inputs) for part in rounds])
    chosen = torch.tensor([int(starts[index]) + row for index, row in rows])
    output = dict(rounds[0].output)
    for name, value in output.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        values = [part.output[name] for part in rounds]
        if value.dim() > 1:
            longest = max(other.size(1) for other in values)
            fill = pad_token_id if name.endswith("_ids") else 0
            values = [_filled_up(other, longest, fill, left=name.startswith("prompt_")) for other in values]
        output[name] = torch.cat(values)[chosen.to(value.device)]
    output["num_items_in_batch"] = processes.gather(output["completion_mask"].sum()).sum()
    return output


def _filled_up(values: torch.Tensor, length: int, fill: int, left: bool) -> torch.Tensor:
    missing = length - values.size(1)
    return torch.nn.functional.pad(values, (missing, 0) if left else (0, missing), value=fill)


def replace_rows(logs: dict[str, Any], table: dict[str, Any], moves: list[tuple[int, int]]) -> None:
    """Replace rows of a completions table by those of another, `(row, its row)` each; `None` where it has no such."""
    columns = [(logs[name], table[name]) for name in SINGLE if len(logs[name])]
    columns += [(logs[name][key], table[name].get(key, ())) for name in BY_NAME for key in logs[name]]
    for values, others in columns:
        for to, row in moves:
            if to < len(values):
                values[to] = others[row] if row < len(others) else None


@contextmanager
def aside(metrics: dict[str, list[float]], algorithm: Any) -> Iterator[None]:
    """
    A further round: metrics stay those of the rows first sampled, but for the tokens so far, and so does what the
    algorithm keeps.
    """
    lengths, state = {name: len(values) for name, values in metrics.items()}, copy.deepcopy(algorithm.state_dict())
    try:
        yield
    finally:
        algorithm.load_state_dict(state)
        for name in list(metrics):
            del metrics[name][lengths.get(name, 0) :]
