"""Expert trajectories for the prompts of a data set: drawn once, graded, kept across interruptions."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mentor_trl.data.loading import DataError, load_dataset_dict, select_split
from mentor_trl.rewards.accuracy import accuracy_reward
from mentor_trl.rewards.answers import THINK_START

from .engines import BATCH_SIZES, Engine, Response, Sampling, choose_engine
from .output import OutputArguments, check_output
from .prompts import render_prompts
from .report import Report
from .sources import load_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


@dataclass
class TrajectoryArguments:
    """
    Arguments of `mentor-trl data trajectories`.

    Args:
        dataset_name (`str`, *optional*):
            Prompt dataset: Hub id, file, or folder that `mentor-trl data` made.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split that gets trajectories. The other splits stay as they are.
        expert (`str`, *optional*):
            Hub id or folder of the expert; of a server, the name under which it serves the expert.
        expert_revision (`str`, *optional*):
            Revision of the expert.
        tokenizer (`str`, *optional*):
            Hub id or folder of the tokenizer whose chat template renders the prompts: the policy's, which must have
            the expert's tokens. If not set, the expert's.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the expert's repository ships.
        keep_correct (`bool`, *optional*, defaults to `False`):
            Whether only responses that `accuracy_reward` grades as correct become trajectories.
        all_trajectories (`bool`, *optional*, defaults to `False`):
            Whether to keep every response that may, in the column `trajectories`.
        num (`int`, *optional*, defaults to `1`):
            Responses a prompt; the first that may becomes its trajectory.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature; `0` for the likeliest token.
        top_p (`float`, *optional*, defaults to `0.95`):
            Nucleus that is sampled from.
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            Tokens that a response may have. A response that reaches them is no trajectory.
        seed (`int`, *optional*, defaults to `42`):
            Seed.
        max_samples (`int`, *optional*):
            Number of rows to keep, from the first one.
        engine (`str`, *optional*, defaults to `"auto"`):
            `transformers`, `vllm`, `server`, or `auto` for a server where `server_url` is set, vLLM where it is
            installed, and transformers otherwise.
        server_url (`str`, *optional*):
            Address of a stock vLLM server of the expert.
        batch_size (`int`, *optional*):
            Prompts a batch; the responses are saved after each. If not set, 8 (transformers), 512 (vLLM) or 64
            (server).
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the expert's weights.
        tensor_parallel_size (`int`, *optional*):
            Devices that vLLM spreads the expert over.
        gpu_memory_utilization (`float`, *optional*):
            Share of the memory that vLLM may use.
        max_model_len (`int`, *optional*):
            Longest sequence that vLLM makes room for.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompt dataset: Hub id, file, or folder that `mentor-trl data` made."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split that gets trajectories. The other splits stay as they are."}
    )
    expert: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the expert; of a server, the name under which it serves the expert."},
    )
    expert_revision: str | None = field(default=None, metadata={"help": "Revision of the expert."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the tokenizer whose chat template renders the prompts: the policy's, which "
            "must have the expert's tokens. If not set, the expert's."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that the expert's repository ships."}
    )
    keep_correct: bool = field(
        default=False,
        metadata={"help": "Whether only responses that `accuracy_reward` grades as correct become trajectories."},
    )
    all_trajectories: bool = field(
        default=False, metadata={"help": "Whether to keep every response that may, in the column `trajectories`."}
    )
    num: int = field(default=1, metadata={"help": "Responses a prompt; the first that may becomes its trajectory."})
    temperature: float = field(default=0.6, metadata={"help": "Temperature; 0 for the likeliest token."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus that is sampled from."})
    max_new_tokens: int = field(
        default=4096,
        metadata={"help": "Tokens that a response may have. A response that reaches them is no trajectory."},
    )
    seed: int = field(default=42, metadata={"help": "Seed."})
    max_samples: int | None = field(default=None, metadata={"help": "Number of rows to keep, from the first one."})
    engine: Literal["auto", "transformers", "vllm", "server"] = field(
        default="auto",
        metadata={
            "help": "`auto` for a server where `server_url` is set, vLLM where it is installed, and transformers "
            "otherwise."
        },
    )
    server_url: str | None = field(default=None, metadata={"help": "Address of a stock vLLM server of the expert."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts a batch; the responses are saved after each. If not set, 8 (transformers), 512 (vLLM) or "
            "64 (server)."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "Data type of the expert's weights."})
    tensor_parallel_size: int | None = field(
        default=None, metadata={"help": "Devices that vLLM spreads the expert over."}
    )
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "Share of the memory that vLLM may use."}
    )
    max_model_len: int | None = field(default=None, metadata={"help": "Longest sequence that vLLM makes room for."})


class ResponseStore:
    """
    Responses on disk, a line a row of the data set, so that a run that died goes on where it was.

    Args:
        folder (`Path`):
            Folder of the files, made at the first response.
        settings (`dict[str, Any]`):
            What the responses depend on; stored responses of other settings are refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.settings_path, self.rows_path = folder / "settings.json", folder / "responses.jsonl"
        self.responses: dict[int, list[Response]] = {}
        if self.settings_path.exists():
            self._check(json.loads(self.settings_path.read_text()))
            self._read()

    def _check(self, stored: dict[str, Any]) -> None:
        names = [key for key in self.settings if stored.get(key) != self.settings[key]]
        if names:
            differ = ", ".join(f"{key} ({stored.get(key)!r} then, {self.settings[key]!r} now)" for key in names)
            raise DataError(
                f"{self.folder} holds responses of an earlier run that differs in {differ}; run with the settings of "
                "then to go on with it, or remove the folder to begin anew"
            )

    def _read(self) -> None:
        if not self.rows_path.exists():
            return
        content = self.rows_path.read_bytes()
        # A run that died while it wrote leaves a last line without its end.
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.rows_path.write_bytes(whole)
        for line in whole.decode().splitlines():
            row = json.loads(line)
            self.responses[row["index"]] = [Response(**response) for response in row["responses"]]

    def add(self, responses: dict[int, list[Response]]) -> None:
        """Store the responses of a batch, by the index of their row."""
        if not self.settings_path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.settings_path.write_text(json.dumps(self.settings, indent=2))
        lines = [
            json.dumps({"index": index, "responses": [asdict(response) for response in found]}) + "\n"
            for index, found in responses.items()
        ]
        with self.rows_path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        self.responses |= responses

    def remove(self) -> None:
        """Remove the files, once the data set is written."""
        for path in (self.rows_path, self.settings_path):
            path.unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def store_folder(output_dir: str) -> Path:
    """Folder of the responses of a run that is under way: beside the output, with `.partial` at its end."""
    path = Path(output_dir).expanduser()
    return path.with_name(path.name + ".partial")


def prepare_trajectories(
    args: TrajectoryArguments, output: OutputArguments, engine: Engine | None = None
) -> "tuple[DatasetDict, Report, ResponseStore]":
    """
    Draw expert trajectories for the prompts of a data set.

    Rows that have a trajectory already keep it; the others get one, or `None` where no response may be one.

    Args:
        args ([`TrajectoryArguments`]):
            The data set, the expert and how its responses are drawn.
        output ([`~mentor_trl.data.preparation.output.OutputArguments`]):
            Where the data set will go; the responses are kept beside it until then.
        engine ([`~mentor_trl.data.preparation.engines.Engine`], *optional*):
            What draws the responses, instead of the one that `args` names.

    Returns:
        `tuple[DatasetDict, Report, ResponseStore]`: all splits, the one of `args.dataset_split` with the column
        `trajectory` (and `trajectories`); the counts; and the store, to be removed once the data set is written.

    Raises:
        [`~mentor_trl.data.DataError`]: naming the option or column that is wrong.
    """
    check_output(output)
    sampling = Sampling(args.num, args.temperature, args.top_p, args.max_new_tokens)
    kind = "given" if engine else choose_engine(args.engine, args.server_url)
    splits, rows = _load(args, output)
    tokenizer, expert_tokenizer = _load_tokenizers(args)
    given = list(rows["trajectory"]) if "trajectory" in rows.column_names else [None] * len(rows)
    todo = [index for index, trajectory in enumerate(given) if not trajectory]
    if not todo:
        raise DataError(f"Every row of {args.dataset_name} has a trajectory already; drop the column to draw new ones")
    prompts = list(rows["prompt"])
    ids = dict(zip(todo, render_prompts([prompts[index] for index in todo], tokenizer), strict=True))
    store = ResponseStore(store_folder(output.output_dir), _settings(args, ids))
    left = [index for index in todo if index not in store.responses]
    if left:
        engine = engine or _make_engine(kind, args, sampling, expert_tokenizer)
        _draw(engine, store, left, ids, args, args.batch_size or BATCH_SIZES.get(kind, 8))
    opened = {index for index in todo if _opens_thought(tokenizer, ids[index])}
    columns, report = _choose(args, rows, given, todo, store, opened)
    report.facts.insert(0, ("responses of an earlier run", f"{len(todo) - len(left):,} of {len(todo):,} prompts"))
    splits[args.dataset_split] = _with_columns(rows, columns)
    return splits, report, store


def _load(args: TrajectoryArguments, output: OutputArguments) -> "tuple[DatasetDict, Dataset]":
    if not args.dataset_name:
        raise DataError("No dataset is given; set `dataset_name` to a prompt dataset")
    if not args.expert:
        raise DataError("No expert is given; set `expert` to a Hub id or a folder")
    if not output.output_dir:
        raise DataError("`output_dir` is not set; it is needed here, since responses are kept beside it as they come")
    for option in ("batch_size", "max_samples"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise DataError(f"`{option}` is {value}; it must be 1 or more")
    splits = load_dataset_dict(args.dataset_name, args.dataset_config)
    rows = select_split(splits, args.dataset_split, "dataset_split")
    needed = ["prompt"] + ["solution"] * args.keep_correct
    absent = [column for column in needed if column not in rows.column_names]
    if absent:
        raise DataError(
            f"{args.dataset_name} has no column '{absent[0]}', only {rows.column_names}; make a prompt dataset of it "
            "with `mentor-trl data custom`"
        )
    if args.max_samples is not None:
        rows = rows.select(range(min(args.max_samples, len(rows))))
    if len(rows) == 0:
        raise DataError(f"There are no rows in {args.dataset_name} (split '{args.dataset_split}')")
    return splits, rows


def _load_tokenizers(args: TrajectoryArguments) -> "tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]":
    """The tokenizer that renders, and the expert's, which of a server is not at hand."""
    from mentor_trl.experts.load import check_tokenizers, load_expert_tokenizer

    if args.tokenizer is None:
        tokenizer = load_expert_tokenizer(args.expert, args.expert_revision, args.trust_remote_code)
        return tokenizer, tokenizer
    tokenizer = load_tokenizer(args.tokenizer, args.trust_remote_code)
    if args.server_url:
        return tokenizer, None
    expert_tokenizer = load_expert_tokenizer(args.expert, args.expert_revision, args.trust_remote_code)
    check_tokenizers(tokenizer, expert_tokenizer)
    return tokenizer, expert_tokenizer


def _settings(args: TrajectoryArguments, ids: dict[int, list[int]]) -> dict[str, Any]:
    names = ("expert", "expert_revision", "num", "temperature", "top_p", "max_new_tokens", "seed")
    digest = hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()
    return {**{name: getattr(args, name) for name in names}, "prompts": f"{len(ids)} prompts, sha256 {digest[:16]}"}


def _make_engine(
    kind: str, args: TrajectoryArguments, sampling: Sampling, tokenizer: "PreTrainedTokenizerBase | None"
) -> Engine:
    from .engines import ServerEngine, TransformersEngine, VLLMEngine

    if kind == "server":
        return ServerEngine(args.server_url, args.expert, sampling)
    if kind == "transformers":
        return TransformersEngine(
            args.expert, tokenizer, sampling, args.dtype, args.expert_revision, args.trust_remote_code
        )
    return VLLMEngine(
        args.expert,
        sampling,
        dtype=args.dtype,
        revision=args.expert_revision,
        trust_remote_code=args.trust_remote_code,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len,
        seed=args.seed,
    )


def _draw(
    engine: Engine,
    store: ResponseStore,
    left: list[int],
    ids: dict[int, list[int]],
    args: TrajectoryArguments,
    batch_size: int,
) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=len(ids), initial=len(ids) - len(left), desc="Expert trajectories", unit="prompt") as bar:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            drawn = engine.generate([ids[index] for index in batch], [args.seed + index for index in batch])
            store.add(dict(zip(batch, drawn, strict=True)))
            bar.update(len(batch))


def _opens_thought(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> bool:
    # Templates of reasoning models may write the opening tag into the prompt.
    return tokenizer.decode(ids[-8:]).rstrip().endswith(THINK_START)


def _choose(
    args: TrajectoryArguments,
    rows: "Dataset",
    given: list[str | None],
    todo: list[int],
    store: ResponseStore,
    opened: set[int],
) -> tuple[dict[str, list], Report]:
    texts = {
        index: [f"{THINK_START}\n{r.text.lstrip()}" if index in opened else r.text for r in store.responses[index]]
        for index in todo
    }
    finished = {index: [r.finished and bool(r.text.strip()) for r in store.responses[index]] for index in todo}
    report = Report(loaded=len(rows))
    report.facts += _counts("finished", finished)
    usable = finished
    if args.keep_correct:
        usable, skipped = _grade(texts, finished, list(rows["solution"]))
        report.facts += _counts("finished and correct", usable)
        report.facts.append(("prompts whose solution cannot be graded", f"{skipped:,}"))
    chosen = {index: [text for text, ok in zip(texts[index], usable[index]) if ok] for index in todo}
    trajectory = list(given)
    for index in todo:
        trajectory[index] = chosen[index][0] if chosen[index] else None
    number = sum(text is not None for text in trajectory)
    report.facts.append(("rows with a trajectory", f"{number:,}, of which {len(rows) - len(todo):,} had one before"))
    report.facts.append(("rows without (null)", f"{len(rows) - number:,}"))
    columns = {"trajectory": trajectory}
    if args.all_trajectories:
        columns["trajectories"] = [chosen.get(i, [given[i]]) for i in range(len(rows))]
    return columns, report


def _counts(name: str, marks: dict[int, list[bool]]) -> list[tuple[str, str]]:
    total = sum(len(row) for row in marks.values())
    return [
        (f"responses {name}", f"{sum(map(sum, marks.values())):,} of {total:,}"),
        (f"prompts with a response {name}", f"{sum(map(any, marks.values())):,} of {len(marks):,}"),
    ]


def _grade(
    texts: dict[int, list[str]], finished: dict[int, list[bool]], solutions: list[str]
) -> tuple[dict[int, list[bool]], int]:
    flat = [(index, text, solutions[index] or "") for index, found in texts.items() for text in found]
    rewards = accuracy_reward([text for _, text, _ in flat], solution=[solution for _, _, solution in flat])
    correct: dict[int, list[bool]] = {index: [] for index in texts}
    skipped = {index for (index, _, _), reward in zip(flat, rewards, strict=True) if reward is None}
    for (index, _, _), reward in zip(flat, rewards, strict=True):
        correct[index].append(reward == 1.0)
    return {i: [a and b for a, b in zip(correct[i], finished[i], strict=True)] for i in texts}, len(skipped)


def _with_columns(rows: "Dataset", columns: dict[str, list]) -> "Dataset":
    from datasets import List, Value

    types = {"trajectory": Value("string"), "trajectories": List(Value("string"))}
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=types[name])
    return rows
