"""
From a dataset (Hub id, local file or local folder) to the rows that the trainer takes: a `prompt`, and a `solution`
for the reward functions.

Everything is checked here, before any model is loaded; a [`DataError`] says which row or option is wrong and how to
mend it.
"""

import difflib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ScriptArguments

from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features
    from trl import DatasetMixtureConfig


MENTOR_SYSTEM_PROMPT = (
    "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You FIRST think about the "
    "reasoning process as an internal monologue and then provide the final answer. The reasoning process MUST BE "
    "enclosed within <think></think> tags. The final answer MUST BE put in \\boxed{}."
)
"""The system prompt of the MENTOR paper, word for word."""

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?%?")


class DataError(SetupError):
    """A dataset or a data option cannot be used as it is; the message names the mend."""


@dataclass
class MentorScriptArguments(ScriptArguments):
    """
    Arguments of `mentor-trl train` about data and rewards.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Reward functions to use. Supported values are:
                - `"accuracy_reward"` (the final answer, checked with math-verify)
                - `"format_reward"` (`<think>...</think>` followed by `\\boxed{...}`)
                - TRL's `"reasoning_accuracy_reward"`, `"think_format_reward"` and `"get_soft_overlong_punishment"`
                - any dotted import path (e.g., `"my_lib.rewards.custom_reward"`).
        reward_model_name_or_path (`str`, *optional*):
            Reward model id on the Hub, or path to a folder saved with `save_pretrained`.
        dataset_prompt_column (`str`, *optional*):
            Column that holds the prompt: text, or a list of messages. If not set, the column `prompt`.
        dataset_solution_column (`str`, *optional*):
            Column that holds the reference solution. If not set, the column `solution`.
        dataset_solution_delimiter (`str`, *optional*):
            If set, the solution is what follows the last occurrence of this text (`"####"` for GSM8K), with the
            commas that group thousands removed.
        system_prompt (`str`, *optional*):
            System prompt put before every prompt, or the word `"mentor"` for the system prompt of the MENTOR paper.
            It takes the place of a system message that a row brings itself.
        conversational (`bool`, *optional*):
            Whether prompts given as text become messages (`True`) or stay text (`False`). If not set, they become
            messages when the tokenizer has a chat template.
        hint_fraction (`float`, *optional*):
            If set, the first so much of a row's expert trajectory (a share of its characters; QuestA: 0.5) is appended
            to its prompt as a hint, in the training rows only. Rows without a trajectory keep the plain prompt.
        dataset_trajectory_column (`str`, *optional*, defaults to `"trajectory"`):
            Column that holds the expert trajectory that hints are taken from.
        max_train_samples (`int`, *optional*):
            Number of training rows to keep, from the first one.
        max_eval_samples (`int`, *optional*):
            Number of evaluation rows to keep, from the first one.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions to use. Supported values are: `accuracy_reward`, `format_reward`, TRL's "
            "`reasoning_accuracy_reward`, `think_format_reward` and `get_soft_overlong_punishment`, or any dotted "
            "import path (e.g., `my_lib.rewards.custom_reward`)."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model id on the Hub, or path to a folder saved with `save_pretrained`."},
    )
    dataset_prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the prompt: text, or a list of messages. If not set, the column `prompt`."
        },
    )
    dataset_solution_column: str | None = field(
        default=None,
        metadata={"help": "Column that holds the reference solution. If not set, the column `solution`."},
    )
    dataset_solution_delimiter: str | None = field(
        default=None,
        metadata={
            "help": "If set, the solution is what follows the last occurrence of this text (`####` for GSM8K), with "
            "the commas that group thousands removed."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System prompt put before every prompt, or the word `mentor` for the system prompt of the MENTOR "
            "paper. It takes the place of a system message that a row brings itself."
        },
    )
    conversational: bool | None = field(
        default=None,
        metadata={
            "help": "Whether prompts given as text become messages (True) or stay text (False). If not set, they "
            "become messages when the tokenizer has a chat template."
        },
    )
    hint_fraction: float | None = field(
        default=None,
        metadata={
            "help": "If set, the first so much of a row's expert trajectory (a share of its characters; QuestA: 0.5) "
            "is appended to its prompt as a hint, in the training rows only. Rows without a trajectory keep the plain "
            "prompt."
        },
    )
    dataset_trajectory_column: str = field(
        default="trajectory",
        metadata={"help": "Column that holds the expert trajectory that hints are taken from."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Number of training rows to keep, from the first one."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of evaluation rows to keep, from the first one."}
    )


def load_dataset_dict(name: str, config: str | None = None, streaming: bool = False) -> "DatasetDict":
    """
    Load every split of a dataset.

    Args:
        name (`str`):
            Hub id, path of a `.json`, `.jsonl`, `.parquet` or `.csv` file, or path of a folder: one written by
            `save_to_disk`, or one that holds data files.
        config (`str`, *optional*):
            Configuration name of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream the rows instead of loading them.

    Returns:
        [`~datasets.DatasetDict`]: the splits. A single file gives one split, `train`.
    """
    from datasets import load_dataset

    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, streaming)
    file_format = FILE_FORMATS.get(path.suffix.lower())
    if path.is_file():
        if file_format is None:
            raise DataError(f"{name}: files of type '{path.suffix}' cannot be read; use one of {sorted(FILE_FORMATS)}")
        load = lambda: load_dataset(file_format, data_files={"train": str(path)}, streaming=streaming)  # noqa: E731
        return _read(load, name, f"make it a valid {file_format} file", path=path if file_format == "json" else None)
    if file_format or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"Dataset file or folder {name} does not exist (working directory: {Path.cwd()})")
    return _read(
        lambda: load_dataset(name, name=config, streaming=streaming),
        name,
        "check the Hub id, `dataset_config` and the connection, or give the path of a local file or folder",
    )


def _load_folder(path: Path, config: str | None, streaming: bool) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if not any(path.iterdir()):
        raise DataError(f"Dataset folder {path} is empty; put data files ({', '.join(FILE_FORMATS)}) into it")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        dataset = _read(lambda: load_from_disk(str(path)), path, "write it again with `save_to_disk`")
        dataset = DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
        return dataset if not streaming else DatasetDict({k: v.to_iterable_dataset() for k, v in dataset.items()})
    # The card of a cloned repository declares configurations; a plain folder of files has none.
    config = config if (path / "README.md").exists() else None
    return _read(
        lambda: load_dataset(str(path), name=config, streaming=streaming),
        path,
        f"put data files of one type ({', '.join(FILE_FORMATS)}) into it, or a folder written by `save_to_disk`",
    )


def _read(load: Callable[[], Any], name: str | Path, mend: str, path: Path | None = None) -> Any:
    # `datasets` raises a dozen unrelated types here (pyarrow, fsspec, Hub and builder errors).
    try:
        return load()
    except Exception as error:
        where = _first_bad_json_line(path) if path else ""
        cause = error.__cause__ or error
        raise DataError(f"Dataset {name} cannot be read: {where or _first_line(cause)}; {mend}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _first_bad_json_line(path: Path) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    if path.suffix.lower() != ".jsonl":
        return ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number} is not valid JSON ({error})"
            if not isinstance(row, dict):
                return f"line {number} is not a JSON object"
    return ""


def select_split(dataset: "DatasetDict", split: str, option: str) -> "Dataset":
    """
    Return one split of a dataset.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            The splits.
        split (`str`):
            Name of the split.
        option (`str`):
            Name of the option that `split` comes from, for the error message.
    """
    if split not in dataset:
        splits = ", ".join(f"'{name}'" for name in dataset)
        raise DataError(f"The dataset has no split '{split}', only {splits}; set `{option}` to one of them")
    return dataset[split]


def extract_solution(text: str, delimiter: str) -> str | None:
    """
    Return what follows the last `delimiter` in `text`, or `None` where there is none.

    >>> extract_solution("She sold 24 + 1,000 clips. #### 1,024", "####")
    '1024'
    >>> extract_solution("The pair is #### (1,024)", "####")
    '(1,024)'
    """
    _, found, solution = text.rpartition(delimiter)
    if not found:
        return None
    solution = solution.strip()
    return solution.replace(",", "") if _THOUSANDS.fullmatch(solution) else solution


def build_prompt_dataset(
    dataset: "Dataset",
    *,
    prompt_column: str | None = None,
    solution_column: str | None = None,
    solution_delimiter: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = True,
    require_solution: bool = True,
    max_samples: int | None = None,
    name: str = "the dataset",
) -> "Dataset":
    """
    Turn rows into prompts and solutions.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows. A streamed dataset is checked row by row as it is read.
        prompt_column (`str`, *optional*):
            Column of the prompt. If not set, `prompt`.
        solution_column (`str`, *optional*):
            Column of the solution. If not set, `solution`.
        solution_delimiter (`str`, *optional*):
            The solution is what follows the last occurrence of this text; see [`extract_solution`].
        system_prompt (`str`, *optional*):
            System prompt, or `"mentor"` for [`MENTOR_SYSTEM_PROMPT`].
        conversational (`bool`, *optional*, defaults to `True`):
            Whether text prompts become messages.
        require_solution (`bool`, *optional*, defaults to `True`):
            Whether every row must have a solution.
        max_samples (`int`, *optional*):
            Number of rows to keep, from the first one.
        name (`str`, *optional*, defaults to `"the dataset"`):
            What error messages call the dataset.

    Returns:
        [`~datasets.Dataset`]: rows with the columns `prompt` and (where there is one) `solution`. The other columns
        are kept for the reward functions.
    """
    dataset = _head(dataset, max_samples, name)
    columns = dataset.column_names or list(next(iter(dataset)))
    prompt_column = _find_column(columns, prompt_column, "prompt", ("question", "problem", "instruction"), name)
    solution_is_used = require_solution or solution_column or solution_delimiter or "solution" in columns
    if solution_is_used:
        solution_column = _find_column(columns, solution_column, "solution", ("answer", "ground_truth"), name)
    row_builder = _RowBuilder(
        prompt_column=prompt_column,
        solution_column=solution_column if solution_is_used else None,
        solution_delimiter=solution_delimiter,
        system_prompt=MENTOR_SYSTEM_PROMPT if system_prompt == "mentor" else system_prompt,
        conversational=conversational,
        require_solution=require_solution,
        name=name,
    )
    if not hasattr(dataset, "__len__"):
        return dataset.map(row_builder, with_indices=True)
    features = _built_features(dataset, row_builder)
    # The cache of `datasets` does not notice a change of this module, so it is not asked.
    return dataset.map(
        row_builder, with_indices=True, features=features, load_from_cache_file=False, desc="Building prompts"
    )


def add_hints(
    dataset: "Dataset", fraction: float = 0.5, trajectory_column: str = "trajectory", name: str = "the dataset"
) -> "Dataset":
    """
    Append the first part of each row's expert trajectory to its prompt, as QuestA does. For training rows only.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a `prompt`, as [`build_prompt_dataset`] gives them.
        fraction (`float`, *optional*, defaults to `0.5`):
            Share of the trajectory's characters; see [`~mentor_trl.data.preparation.cut_hint`].
        trajectory_column (`str`, *optional*, defaults to `"trajectory"`):
            Column of the trajectories, which stays. A row without one keeps its prompt; a warning counts them.
        name (`str`, *optional*, defaults to `"the dataset"`):
            What messages call the dataset.

    Returns:
        [`~datasets.Dataset`]: rows with the hint in the prompt, and in a column `hint` (`None` where there is none).

    Raises:
        [`DataError`]: if there is nothing to take hints from, or hints are there already.
    """
    from datasets import Features, Value

    from mentor_trl.data.preparation import cut_hint
    from mentor_trl.data.preparation.hints import append_hint

    if not 0.0 < fraction <= 1.0:
        raise DataError(f"`hint_fraction` is {fraction}; it must be above 0 and up to 1 (QuestA: 0.5), or unset")
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"Rows of {name} that have no trajectory for a hint cannot be counted in a stream; set "
            "`dataset_streaming` to false, or make the hints with `mentor-trl data hints`"
        )
    if "hint" in dataset.column_names:
        raise DataError(f"{name} has a column `hint`: its prompts hold hints already; unset `hint_fraction`")
    _find_column(dataset.column_names, trajectory_column, "trajectory", (), name)

    def row_of(row: dict[str, Any]) -> dict[str, Any]:
        hint = cut_hint(row[trajectory_column] or "", fraction)
        return {"prompt": append_hint(row["prompt"], hint), "hint": hint or None}

    features = Features({**dataset.features, "hint": Value("string")})
    hinted = dataset.map(row_of, features=features, load_from_cache_file=False, desc="Adding hints")
    plain = sum(hint is None for hint in hinted["hint"])
    if plain == len(hinted):
        raise DataError(
            f"No row of {name} has a trajectory in the column '{trajectory_column}'; `mentor-trl data trajectories` "
            "makes them, or unset `hint_fraction`"
        )
    if plain:
        warnings.warn(
            f"{plain:,} of {len(hinted):,} rows of {name} have no trajectory, and keep the plain prompt.", stacklevel=2
        )
    return hinted


def _built_features(dataset: "Dataset", row_builder: "_RowBuilder") -> "Features":
    # Left to itself, `map` casts a new value to the type of the column that it replaces.
    from datasets import Features, List, Value

    features = Features(dataset.features)
    text = Value("string")
    prompt = row_builder(dataset[0], 0)["prompt"]
    if isinstance(prompt, str):
        features["prompt"] = text
    elif isinstance(dataset[0][row_builder.prompt_column], str):
        features["prompt"] = List({"role": text, "content": text})
    else:
        features["prompt"] = features[row_builder.prompt_column]
    if row_builder.solution_column is not None:
        features["solution"] = text
    return features


def _head(dataset: "Dataset", max_samples: int | None, name: str) -> "Dataset":
    if max_samples is not None and max_samples < 1:
        raise DataError(f"The number of rows to keep of {name} is {max_samples}; it must be 1 or more")
    if not hasattr(dataset, "__len__"):
        dataset = dataset if max_samples is None else dataset.take(max_samples)
        is_empty = next(iter(dataset), None) is None
    else:
        dataset = dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))
        is_empty = len(dataset) == 0
    if is_empty:
        raise DataError(f"There are no rows in {name}; check the file, or choose another split")
    return dataset


def _find_column(columns: list[str], given: str | None, default: str, usual: tuple[str, ...], name: str) -> str:
    wanted = given or default
    if wanted in columns:
        return wanted
    near = [column for column in usual if column in columns and given is None]
    near += difflib.get_close_matches(wanted, columns)
    mend = f"set `dataset_{default}_column` to the column that holds the {default}"
    mend += f", for example --dataset_{default}_column {near[0]}" if near else ""
    raise DataError(f"There is no column '{wanted}' in {name}, only {columns}; {mend}")


@dataclass
class _RowBuilder:
    prompt_column: str
    solution_column: str | None
    solution_delimiter: str | None
    system_prompt: str | None
    conversational: bool
    require_solution: bool
    name: str

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        built = {"prompt": self._prompt(row[self.prompt_column], f"row {index} of {self.name}")}
        if self.solution_column is not None:
            built["solution"] = self._solution(row[self.solution_column], f"row {index} of {self.name}")
        return built

    def _prompt(self, prompt: Any, where: str) -> str | list[dict[str, Any]]:
        column = self.prompt_column
        if isinstance(prompt, list):
            return self._messages(prompt, where)
        if not isinstance(prompt, str) and prompt is not None:
            kind = type(prompt).__name__
            raise DataError(f"The prompt (column '{column}') of {where} is of type {kind}, not text or messages")
        if not prompt or not prompt.strip():
            raise DataError(f"The prompt (column '{column}') of {where} is empty; fill it in or remove the row")
        if self.conversational:
            return self._messages([{"role": "user", "content": prompt}], where)
        return f"{self.system_prompt}\n\n{prompt}" if self.system_prompt else prompt

    def _messages(self, messages: list[Any], where: str) -> list[dict[str, Any]]:
        column = self.prompt_column
        if not self.conversational:
            raise DataError(
                f"The prompt (column '{column}') of {where} is a list of messages, which needs a tokenizer with a "
                "chat template; use such a model, or prompts that are plain text"
            )
        # Arrow gives every message the keys of all of them; absent ones come back as None.
        messages = [
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
            for message in messages
        ]
        if not messages or not all("role" in m and m.get("content") for m in messages):
            raise DataError(
                f"The prompt (column '{column}') of {where} holds no messages or an empty one; every message needs "
                "a 'role' and a 'content'"
            )
        if not self.system_prompt:
            return messages
        return [{"role": "system", "content": self.system_prompt}] + [m for m in messages if m["role"] != "system"]

    def _solution(self, solution: Any, where: str) -> str | None:
        column = self.solution_column
        if isinstance(solution, (int, float)) and not isinstance(solution, bool):
            solution = str(solution)
        if solution is None or solution == "":
            if not self.require_solution:
                return None
            raise DataError(f"The solution (column '{column}') of {where} is empty; fill it in or remove the row")
        if not isinstance(solution, str):
            kind = type(solution).__name__
            raise DataError(f"The solution (column '{column}') of {where} is of type {kind}, not text or a number")
        if not self.solution_delimiter:
            return solution
        extracted = extract_solution(solution, self.solution_delimiter)
        if not extracted:
            problem = "has no" if extracted is None else "ends with its"
            raise DataError(
                f"The solution (column '{column}') of {where} {problem} delimiter '{self.solution_delimiter}': "
                f"{solution[-60:]!r}; mend the row, or change `dataset_solution_delimiter`"
            )
        return extracted


def load_prompt_datasets(
    script_args: MentorScriptArguments,
    dataset_args: "DatasetMixtureConfig | None" = None,
    *,
    has_chat_template: bool = True,
    require_solution: bool = True,
    with_eval: bool = False,
) -> "tuple[Dataset, Dataset | None]":
    """
    Load the training rows, and the evaluation rows where they are wanted.

    Args:
        script_args ([`MentorScriptArguments`]):
            Where the rows are, and what becomes of their columns.
        dataset_args ([`~trl.DatasetMixtureConfig`], *optional*):
            A mixture of datasets, used instead of `script_args.dataset_name`.
        has_chat_template (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer has a chat template.
        require_solution (`bool`, *optional*, defaults to `True`):
            Whether a reward function reads the solution.
        with_eval (`bool`, *optional*, defaults to `False`):
            Whether to load the evaluation split too.

    Returns:
        `tuple[Dataset, Dataset | None]`: training rows and evaluation rows.
    """
    dataset, name = _load(script_args, dataset_args)
    if script_args.conversational and not has_chat_template:
        raise DataError(
            "`conversational` is true, but the tokenizer has no chat template; set it to false, or add a template"
        )
    conversational = has_chat_template if script_args.conversational is None else script_args.conversational

    def build(split: str, option: str, max_samples: int | None) -> "Dataset":
        return build_prompt_dataset(
            select_split(dataset, split, option),
            prompt_column=script_args.dataset_prompt_column,
            solution_column=script_args.dataset_solution_column,
            solution_delimiter=script_args.dataset_solution_delimiter,
            system_prompt=script_args.system_prompt,
            conversational=conversational,
            require_solution=require_solution,
            max_samples=max_samples,
            name=f"{name} (split '{split}')",
        )

    train_dataset = build(script_args.dataset_train_split, "dataset_train_split", script_args.max_train_samples)
    if script_args.hint_fraction is not None:
        train_dataset = add_hints(
            train_dataset,
            script_args.hint_fraction,
            script_args.dataset_trajectory_column,
            name=f"{name} (split '{script_args.dataset_train_split}')",
        )
    if not with_eval:
        return train_dataset, None
    return train_dataset, build(script_args.dataset_test_split, "dataset_test_split", script_args.max_eval_samples)


def _load(
    script_args: MentorScriptArguments, dataset_args: "DatasetMixtureConfig | None"
) -> "tuple[DatasetDict, str]":
    mixture = dataset_args.datasets if dataset_args is not None else []
    if mixture and script_args.dataset_name:
        raise DataError("Both `datasets` and `dataset_name` are set; keep one of them")
    if mixture:
        from trl import get_dataset

        paths = [getattr(dataset, "path", str(dataset)) for dataset in mixture]
        return _read(
            lambda: get_dataset(dataset_args), ", ".join(paths), "check the entries of `datasets`"
        ), "the mixture"
    if not script_args.dataset_name:
        raise DataError("No dataset is given; set `dataset_name` to a Hub id, a file or a folder, or set `datasets`")
    name = script_args.dataset_name
    return load_dataset_dict(name, script_args.dataset_config, script_args.dataset_streaming), name
