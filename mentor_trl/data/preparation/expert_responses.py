"""Expert trajectories for the prompts of a dataset: drawn once, graded, kept across interruptions."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.rewards import THINK_START, accuracy_reward

from ..loading import DataError
from .account import Report
from .engines import ENGINES, Engine, Response, choose_engine
from .settings import OutputArguments, TrajectoryArguments
from .sources import check_counts, load_rows, load_tokenizer, render_prompts


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


class ResponseStore:
    """
    Responses on disk, a line a row of the dataset, so that a run that died goes on where it was.

    What they depend on, `settings`, is the file's first line; stored responses of other settings are refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path, self.settings = folder / "responses.jsonl", settings
        content = self.path.read_bytes() if self.path.exists() else b""
        # A run that died while it wrote leaves a last line without its end.
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.path.write_bytes(whole)
        try:
            head, *rows = [json.loads(line) for line in whole.decode().splitlines()] or [settings]
            self.responses = {row["index"]: [Response(*response) for response in row["responses"]] for row in rows}
            settings_then = dict(head)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is damaged ({error!r}); remove the folder to begin anew") from error
        names = [key for key in settings if settings_then.get(key) != settings[key]]
        if names:
            differ = ", ".join(f"{key} ({settings_then.get(key)!r} then, {settings[key]!r} now)" for key in names)
            raise DataError(
                f"{folder} holds responses of an earlier run that differs in {differ}; run with the settings of "
                "then to go on with it, or remove the folder to begin anew"
            )

    def add(self, responses: dict[int, list[Response]]) -> None:
        """Store the responses of a batch, by the index of their row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"index": index, "responses": found} for index, found in responses.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in ([] if file.tell() else [self.settings]) + rows)
        self.responses |= responses

    def remove(self) -> None:
        """Remove the file and its folder, once the dataset is written."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody's own files are in it, or it was never made
            self.path.parent.rmdir()


def prepare_trajectories(
    args: TrajectoryArguments, output: OutputArguments, engine: Engine | None = None
) -> "tuple[DatasetDict, Report, ResponseStore]":
    """
    Draw expert trajectories for the rows of a split that have none yet; `None` where no response may be one.

    The responses are kept in the store, beside where the dataset will go, until it is written. A given `engine` draws
    instead of the one that `args` names.
    """
    from tqdm.auto import tqdm

    _check(args, output)
    make_engine, batch_size = (None, 8) if engine else ENGINES[choose_engine(args.engine, args.server_url)]
    splits, rows = load_rows(args, ["prompt", "solution"] if args.keep_correct else ["prompt"])
    rows = rows if args.max_samples is None else rows.take(min(args.max_samples, len(rows)))
    tokenizer, expert_tokenizer = _load_tokenizers(args)
    given = list(rows["trajectory"]) if "trajectory" in rows.column_names else [None] * len(rows)
    todo = [index for index, trajectory in enumerate(given) if not trajectory]
    if not todo:
        raise DataError(f"Every row of {args.dataset_name} has a trajectory already; drop the column to draw new ones")
    prompts = list(rows["prompt"])
    ids = dict(zip(todo, render_prompts([prompts[index] for index in todo], tokenizer), strict=True))
    path = Path(output.output_dir).expanduser()
    store = ResponseStore(path.with_name(path.name + ".partial"), _settings(args, ids))
    left = [index for index in todo if index not in store.responses]
    if left:
        engine = engine or make_engine(args, expert_tokenizer)
        size = args.batch_size or batch_size
        for start in tqdm(range(0, len(left), size), desc="Expert trajectories", unit="batch"):
            batch = left[start : start + size]
            drawn = engine([ids[index] for index in batch], [args.seed + index for index in batch])
            store.add(dict(zip(batch, drawn, strict=True)))
    texts = {index: _texts(tokenizer, ids[index], store.responses[index]) for index in todo}
    report = Report(loaded=len(rows))
    report.facts.append(("responses of an earlier run", f"{len(todo) - len(left):,} of {len(todo):,} prompts"))
    splits[args.dataset_split] = _add_columns(args, rows, given, texts, store, report)
    return splits, report, store


def _check(args: TrajectoryArguments, output: OutputArguments) -> None:
    if not args.expert:
        raise DataError("No expert is given; set `expert` to a Hub id or a folder")
    if not output.output_dir:
        raise DataError("`output_dir` is not set; it is needed here, since responses are kept beside it as they come")
    check_counts(args, "batch_size", "max_samples", "num", "max_new_tokens")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise DataError(
            f"`temperature` is {args.temperature} and `top_p` {args.top_p}; use a temperature of 0 or more and a "
            "top_p above 0 and up to 1"
        )
    if args.temperature == 0 and args.num > 1:
        raise DataError(f"At `temperature` 0 all {args.num} responses are equal; set `num` to 1, or a temperature")


def _load_tokenizers(args: TrajectoryArguments) -> "tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]":
    """The tokenizer that renders, and the expert's, which of a server is not at hand."""
    from mentor_trl.experts.compatibility import check_tokenizers
    from mentor_trl.experts.load import load_expert_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, args.trust_remote_code) if args.tokenizer else None
    if tokenizer is not None and args.server_url:
        return tokenizer, None
    expert_tokenizer = load_expert_tokenizer(args.expert, args.expert_revision, args.trust_remote_code)
    if tokenizer is not None:
        check_tokenizers(tokenizer, expert_tokenizer)
    return tokenizer or expert_tokenizer, expert_tokenizer


def _settings(args: TrajectoryArguments, ids: dict[int, list[int]]) -> dict[str, Any]:
    names = ("expert", "expert_revision", "num", "temperature", "top_p", "max_new_tokens", "seed")
    digest = hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()
    return {**{name: getattr(args, name) for name in names}, "prompts": f"{len(ids)} prompts, sha256 {digest[:16]}"}


def _texts(tokenizer: "PreTrainedTokenizerBase", ids: list[int], responses: list[Response]) -> list[str]:
    # Templates of reasoning models may write the opening tag into the prompt.
    opened = tokenizer.decode(ids[-8:]).rstrip().endswith(THINK_START)
    return [f"{THINK_START}\n{r.text.lstrip()}" if opened else r.text for r in responses]


def _add_columns(
    args: TrajectoryArguments,
    rows: "Dataset",
    given: list[str | None],
    texts: dict[int, list[str]],
    store: ResponseStore,
    report: Report,
) -> "Dataset":
    from datasets import List, Value

    usable = {index: [r.finished and bool(r.text.strip()) for r in store.responses[index]] for index in texts}
    report.facts += _counts("finished", usable)
    if args.keep_correct:
        rewards = _grade(texts, list(rows["solution"]))
        usable = {i: [ok and reward == 1.0 for ok, reward in zip(usable[i], rewards[i])] for i in texts}
        report.facts += _counts("finished and correct", usable)
        skipped = sum(None in found for found in rewards.values())
        report.facts.append(("prompts whose solution cannot be graded", f"{skipped:,}"))
    chosen = [[text] for text in given]
    for i, drawn in texts.items():
        chosen[i] = [text for text, ok in zip(drawn, usable[i]) if ok]
    first = [next(iter(found), None) for found in chosen]
    number, had = sum(text is not None for text in first), len(rows) - len(texts)
    report.facts.append(("rows with a trajectory", f"{number:,}, of which {had:,} had one before"))
    report.facts.append(("rows without (null)", f"{len(rows) - number:,}"))
    rows = rows.remove_columns([name for name in ("trajectory", "trajectories") if name in rows.column_names])
    rows = rows.add_column("trajectory", first, feature=Value("string"))
    return rows.add_column("trajectories", chosen, feature=List(Value("string"))) if args.all_trajectories else rows


def _counts(name: str, marks: dict[int, list[bool]]) -> list[tuple[str, str]]:
    total = sum(len(row) for row in marks.values())
    return [
        (f"responses {name}", f"{sum(map(sum, marks.values())):,} of {total:,}"),
        (f"prompts with a response {name}", f"{sum(map(any, marks.values())):,} of {len(marks):,}"),
    ]


def _grade(texts: dict[int, list[str]], solutions: list[str | None]) -> dict[int, list[float | None]]:
    flat = [text for found in texts.values() for text in found]
    golds = [solutions[index] or "" for index, found in texts.items() for _ in found]
    rewards = iter(accuracy_reward(flat, solution=golds))
    return {index: [next(rewards) for _ in found] for index, found in texts.items()}
