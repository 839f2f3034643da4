"""Rollouts token by token, on disk: what `mentor-trl plot rollout` shows. One parquet file a training step."""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import SetupError
from .batch import RolloutBatch


FOLDER = "rollouts"
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("row", pa.int64()),
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("gamma", pa.float64()),
        ("alpha", pa.float64()),
        ("token_ids", pa.list_(pa.int64())),
        ("tokens", pa.list_(pa.string())),
        *((name, pa.list_(pa.float32())) for name in ("entropies", "weights", "logps", "expert_logps", "rho")),
        *((name, pa.list_(pa.bool_())) for name in ("branch", "replaced")),
    ]
)


@dataclass(frozen=True)
class RolloutRecord:
    """A rollout and its tokens; lists have one entry a token, `None` where a value is unknown."""

    step: int  # optimizer step that was the first to use it
    row: int  # place in the rollout batch
    source: str
    prompt: str  # messages of a conversation are put together with their roles
    reward: float | None  # weighted
    advantage: float  # before correction
    gamma: float | None  # entropy threshold in nats
    alpha: float  # weight of the mixed advantages
    token_ids: list[int]  # with the token that ended it
    tokens: list[str]  # text that each token adds; a character of several tokens is in the last
    entropies: list[float | None]  # of the policy, in nats
    weights: list[float | None]  # w of the expert
    logps: list[float | None]
    expert_logps: list[float | None]
    rho: list[float | None]  # weight of the token after correction
    branch: list[bool]  # whether the expert chose the token
    replaced: list[bool | None]  # whether it differs from the policy's draft


def collect_records(
    batch: RolloutBatch,
    step: int,
    prompts: Sequence[str | list[dict[str, Any]]],
    rewards: Sequence[float],
    advantages: Sequence[float],
    weights_B_T: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    places: dict[int, int] | None = None,
    unrecorded: bool = False,
) -> list[RolloutRecord]:
    """
    Put together the records of a process's rows, as far as an engine recorded them. `places` has the rows that are
    wanted, if not all, with the place of each in the rollout batch. Rows of which nothing was recorded are left out,
    or have their tokens alone (`unrecorded`).
    """
    found = {row: (part, position) for part in batch.parts for position, row in enumerate(part.rows)}
    records = []
    for row, source in enumerate(batch.source_names()):
        if places is not None and row not in places or row not in found and not unrecorded:
            continue
        part, position = found.get(row, (None, 0))
        ids = list(part.rollout.completion_ids[position] if part else batch.completion_ids[row])
        recorded = part.rollout.records if part else {}
        known = {name: values[position, : len(ids)].tolist() for name, values in recorded.items()}
        unknown = [None] * len(ids)
        values = {
            name: [_finite(value) for value in known[name]] if name in known else unknown
            for name in ("entropies", "weights", "logps", "expert_logps")
        }
        marks = {name: known.get(name, unknown) for name in ("branch", "replaced")}
        records.append(
            RolloutRecord(
                step=step,
                row=row if places is None else places[row],
                source=source,
                prompt=message_text(prompts[row]),
                reward=_finite(rewards[row]),
                advantage=float(advantages[row]),
                gamma=None if source == batch.sources[0] else batch.gamma,
                alpha=batch.alpha,
                token_ids=ids,
                tokens=token_texts(ids, tokenizer),
                rho=[1.0] * len(ids) if weights_B_T is None else weights_B_T[row, : len(ids)].tolist(),
                **values,
                **marks,
            )
        )
    return sorted(records, key=lambda record: record.row)


def draw_rows(sources: Sequence[str], count: int, seed: int) -> list[int]:
    """
    Draw rows at random, of each source in turn.

    >>> [["mixed", "mixed", "on_policy"][row] for row in draw_rows(["mixed", "mixed", "on_policy"], 3, seed=0)]
    ['on_policy', 'mixed', 'mixed']
    """
    draw, names = random.Random(seed), sorted(set(sources))
    rows = draw.sample(range(len(sources)), len(sources))
    by_source = [[row for row in rows if sources[row] == name] for name in draw.sample(names, len(names))]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_source))
    return [row for row in turns if row is not None][:count]


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    Text that each token adds to what stands before it. Their concatenation is the decoded text; special tokens show.
    """
    # A token alone has not the text that it has in its place (leading spaces, characters of several tokens), and
    # decoding all prefixes is quadratic: decode from the last token whose text was complete.
    decode = lambda part: tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ids, texts = list(ids), []
    context, done = 0, 0
    for position in range(len(ids)):
        before, text = decode(ids[context:done]), decode(ids[context : position + 1])
        incomplete = text.endswith("\ufffd") and position + 1 < len(ids)
        texts.append("" if incomplete else text[len(before) :])
        if not incomplete:
            context, done = done, position + 1
    return texts


def save_records(output_dir: str | Path, records: Sequence[RolloutRecord]) -> Path | None:
    """
    Write the records of a step to `output_dir/rollouts/rollouts_<step>.parquet`; an older file of it is replaced.
    """
    if not records:
        return None
    file = Path(output_dir, FOLDER, f"{FOLDER}_{records[0].step:05d}.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dataclasses.asdict(record) for record in records], schema=_SCHEMA)
    part = file.with_suffix(".part")  # nobody who reads while training writes sees half a file
    pq.write_table(table, part, compression="zstd")
    return part.replace(file)


def recorded_steps(run: str | Path) -> dict[int, Path]:
    """
    Steps of a run that have records, with their files.

    Raises:
        [`SetupError`]: if there are none.
    """
    folder = Path(run)
    if not folder.exists():
        raise SetupError(f"Run {run} does not exist (working directory: {Path.cwd()}).")
    names = ((re.fullmatch(rf"{FOLDER}_(\d+)", file.stem), file) for file in folder.glob(f"{FOLDER}/*.parquet"))
    steps = {int(name.group(1)): file for name, file in names if name}
    if not steps:
        raise SetupError(
            f"Run {run} has no file {FOLDER}/{FOLDER}_<step>.parquet. Training writes them while rollouts are mixed, "
            "if told to: set `log_rollout_records` to a number of rows."
        )
    return dict(sorted(steps.items()))


def read_records(run: str | Path, step: int | None = None) -> list[RolloutRecord]:
    """
    Read the records of a step.

    Raises:
        [`SetupError`]: if the step has no records; it names those that have.
    """
    steps = recorded_steps(run)
    step = max(steps) if step is None else step
    if step not in steps:
        raise SetupError(f"Run {run} has no records of step {step}. It has those of {_ranges(list(steps))}.")
    try:
        rows = pq.read_table(steps[step]).to_pylist()
        return [RolloutRecord(**row) for row in rows]
    except (pa.ArrowException, TypeError) as error:
        raise SetupError(f"{steps[step]} cannot be read as records of rollouts: {error}") from error


def choose_rows(records: Sequence[RolloutRecord], rows: Sequence[int] | None = None) -> list[RolloutRecord]:
    """
    Records of some rows; without rows, the first mixed one, or the first if none is mixed.

    Raises:
        [`SetupError`]: if a row is not there; it names those that are.
    """
    by_row = {record.row: record for record in records}
    if rows is None:
        return [next((record for record in records if record.source == "mixed"), records[0])]
    for row in rows:
        if row not in by_row:
            raise SetupError(
                f"Step {records[0].step} has no record of row {row}; it has rows {_ranges(list(by_row))}."
            )
    return [by_row[row] for row in rows]


def _ranges(steps: list[int], most: int = 12) -> str:
    if len(steps) <= most:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[: most - 2]))}, ... {steps[-1]} ({len(steps)} in all)"


def message_text(prompt: str | list[dict[str, Any]]) -> str:
    """Text of a prompt; messages are put together with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{message['role']}] {message['content']}" for message in prompt)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
