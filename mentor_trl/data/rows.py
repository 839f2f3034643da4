"""
From the columns of a dataset to the rows that the trainer takes: a `prompt`, and a `solution` for the rewards.

Everything is checked here, before any model is loaded; a [`DataError`] says which row or option is wrong and how to
fix it.
"""

from decimal import Decimal
from types import NoneType
from typing import TYPE_CHECKING, Any

from mentor_trl.rewards.answers import extract_solution

from .cells import answer_text, cell, column_paths, find_column, text_of, widen
from .hints import add_hints
from .loading import DataError, load_dataset_dict, read_dataset, select_split


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import DatasetMixtureConfig, ScriptArguments


MENTOR_SYSTEM_PROMPT = (
    "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You FIRST think about the "
    "reasoning process as an internal monologue and then provide the final answer. The reasoning process MUST BE "
    "enclosed within <think></think> tags. The final answer MUST BE put in \\boxed{}."
)
"""The system prompt of the MENTOR paper, word for word."""

ROLES = {"system", "developer", "user", "assistant", "tool"}
# Arguments that TRL gives every reward function beside the columns.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


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
    from datasets import Features, List, Value

    dataset = _head(dataset, max_samples, name)
    paths, first = column_paths(dataset), next(iter(dataset))
    taken = next((column for column in RESERVED if column in first), None)
    if taken is not None:
        raise DataError(f"{name} has a column '{taken}', as TRL calls an argument of reward functions; rename it")
    prompt_column = _column(paths, prompt_column, "prompt", ("question", "problem", "instruction"), name)
    # A solution of a form of its own is left to the reward function that knows it.
    is_plain = isinstance(first.get("solution", {}), (str, int, float, Decimal, NoneType))
    if require_solution or solution_column or solution_delimiter or is_plain:
        solution_column = _column(paths, solution_column, "solution", ("answer", "ground_truth"), name)
        dataset = widen(dataset, solution_column)
    else:
        solution_column = None
    system_prompt = MENTOR_SYSTEM_PROMPT if system_prompt == "mentor" else system_prompt

    def row_of(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"The prompt (column '{prompt_column}') of row {index} of {name}"
        built = {"prompt": _prompt(cell(row, prompt_column), where, system_prompt, conversational)}
        if solution_column is not None:
            where = f"The solution (column '{solution_column}') of row {index} of {name}"
            built["solution"] = _solution(cell(row, solution_column), where, solution_delimiter, require_solution)
        return built

    if not hasattr(dataset, "__len__"):
        return dataset.map(row_of, with_indices=True)
    features = Features(dataset.features)
    # Left to itself, `map` casts a new value to the type of the column that it replaces.
    given, text = cell(features, prompt_column), Value("string")
    if isinstance(row_of(dataset[0], 0)["prompt"], str):
        features["prompt"] = text
    else:
        features["prompt"] = List({"role": text, "content": text}) if isinstance(given, Value) else given
    if solution_column is not None:
        features["solution"] = text
    # The cache of `datasets` does not notice a change of this module, so it is not asked.
    return dataset.map(
        row_of, with_indices=True, features=features, load_from_cache_file=False, desc="Building prompts"
    )


def _head(dataset: "Dataset", max_samples: int | None, name: str) -> "Dataset":
    if max_samples is not None and max_samples < 1:
        raise DataError(f"The number of rows to keep of {name} is {max_samples}; it must be 1 or more")
    if max_samples is not None:
        dataset = dataset.take(min(max_samples, len(dataset)) if hasattr(dataset, "__len__") else max_samples)
    fix = "fix the row that it names, or load the rows with `dataset_streaming` false"
    if read_dataset(lambda: next(iter(dataset), None), name, fix) is None:
        raise DataError(f"There are no rows in {name}; check the file, or choose another split")
    return dataset


def _column(paths: list[str], given: str | None, default: str, usual: tuple[str, ...], name: str) -> str:
    near = usual + tuple(path for path in paths if path.rpartition(".")[2] in (default, *usual))
    return find_column(paths, (given or default,), f"dataset_{default}_column", name, near=() if given else near)


def _prompt(prompt: Any, where: str, system_prompt: str | None, conversational: bool) -> str | list[dict[str, Any]]:
    if isinstance(prompt, list):
        if not conversational:
            raise DataError(
                f"{where} is a list of messages, which needs a tokenizer with a chat template; use such a model, or "
                "prompts that are plain text"
            )
        if not prompt:
            raise DataError(f"{where} holds no messages; fill it in or remove the row")
        messages = [_message(m, f"Message {i} of {where[0].lower()}{where[1:]}") for i, m in enumerate(prompt)]
        if not system_prompt:
            return messages
        return [{"role": "system", "content": system_prompt}] + [m for m in messages if m["role"] != "system"]
    if not (text_of(prompt, where) or "").strip():
        raise DataError(f"{where} is empty; fill it in or remove the row")
    if conversational:
        return _prompt([{"role": "user", "content": prompt}], where, system_prompt, conversational)
    return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt


def _solution(value: Any, where: str, delimiter: str | None, required: bool) -> str | None:
    solution = answer_text(value, where)
    if solution is None and required:
        raise DataError(f"{where} is empty; fill it in or remove the row")
    if solution is None or not delimiter:
        return solution
    extracted = extract_solution(solution, delimiter)
    if not extracted:
        problem = "has no" if extracted is None else "ends with its"
        raise DataError(
            f"{where} {problem} delimiter '{delimiter}': {solution[-60:]!r}; fix the row, or change "
            "`dataset_solution_delimiter`"
        )
    return extracted


def _message(message: Any, where: str, may_be_empty: bool = False) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {message!r:.100}; every message needs a 'role' and a 'content'")
    # Arrow gives every message the keys of all of them; absent ones come back as None.
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role is None:
        found = "the keys " + ", ".join(f"'{key}'" for key in message) if message else "no keys"
        raise DataError(f"{where} has {found}; every message needs a 'role' and a 'content'")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}, which chat templates do not know; use one of {sorted(ROLES)}")
    if content is not None and not isinstance(content, (str, list)):
        kind = type(content).__name__
        raise DataError(f"{where} has a 'content' of type {kind}; write it as text, or as a list of blocks")
    may_be_empty = may_be_empty or role == "tool" or role == "assistant" and message.get("tool_calls")
    if not may_be_empty and not (content.strip() if isinstance(content, str) else content):
        raise DataError(f"{where} has an empty 'content'; fill it in, or remove the message or the row")
    return message if content is not None else {**message, "content": ""}


def prompt_text(prompt: Any, where: str = "the dataset") -> str:
    """Return the text of the problem in a prompt: the prompt itself, or what its user messages say."""
    if not isinstance(prompt, list):
        return text_of(prompt, f"The prompt of {where}") or ""
    messages = [_message(message, f"Message {i} of the prompt of {where}", True) for i, message in enumerate(prompt)]
    contents = [message["content"] for message in messages if message["role"] == "user"]
    blocks = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "\n".join("".join(b.get("text") or "" for b in content if isinstance(b, dict)) for content in blocks)


def load_prompt_datasets(
    script_args: "ScriptArguments",
    dataset_args: "DatasetMixtureConfig | None" = None,
    *,
    has_chat_template: bool = True,
    require_solution: bool = True,
    with_eval: bool = False,
) -> "tuple[Dataset, Dataset | None]":
    """
    Load the training rows, and the evaluation rows where they are wanted.

    Args:
        script_args ([`~mentor_trl.cli.arguments.MentorScriptArguments`]):
            Where the rows are, and what becomes of their columns.
        dataset_args ([`~trl.DatasetMixtureConfig`], *optional*):
            A mixture of datasets, used instead of `script_args.dataset_name`.
        has_chat_template (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer has a chat template.
        require_solution (`bool`, *optional*, defaults to `True`):
            Whether a reward function reads the solution.
        with_eval (`bool`, *optional*, defaults to `False`):
            Whether to load the evaluation split too.
    """
    dataset, name = _load(script_args, dataset_args)
    if script_args.conversational and not has_chat_template:
        raise DataError(
            "`conversational` is true, but the tokenizer has no chat template; set it to false, or add a template"
        )
    conversational = has_chat_template if script_args.conversational is None else script_args.conversational

    def build(option: str, max_samples: int | None) -> "Dataset":
        split = getattr(script_args, option)
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

    train_dataset = build("dataset_train_split", script_args.max_train_samples)
    if script_args.hint_fraction is not None:
        where = f"{name} (split '{script_args.dataset_train_split}')"
        train_dataset = add_hints(
            train_dataset, script_args.hint_fraction, script_args.dataset_trajectory_column, name=where
        )
    return train_dataset, build("dataset_test_split", script_args.max_eval_samples) if with_eval else None


def _load(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig | None") -> "tuple[DatasetDict, str]":
    mixture = dataset_args.datasets if dataset_args is not None else []
    if mixture and script_args.dataset_name:
        raise DataError("Both `datasets` and `dataset_name` are set; keep one of them")
    if mixture:
        from trl import get_dataset

        paths = [getattr(dataset, "path", str(dataset)) for dataset in mixture]
        name, fix = f"The mixture of {', '.join(paths)}", "check the entries of `datasets`"
        return read_dataset(lambda: get_dataset(dataset_args), name, fix), "the mixture"
    if not script_args.dataset_name:
        raise DataError("No dataset is given; set `dataset_name` to a Hub id, a file or a folder, or set `datasets`")
    name = script_args.dataset_name
    return load_dataset_dict(name, script_args.dataset_config, script_args.dataset_streaming), name
