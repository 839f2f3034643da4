"""From a source of problems to a prompt dataset: columns, levels, test sets, duplicates and lengths."""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.data.loading import (
    MENTOR_SYSTEM_PROMPT,
    DataError,
    build_prompt_dataset,
    load_dataset_dict,
    select_split,
)

from .matching import normalize_problem, problem_text
from .openr1 import COMPLETE, CORRECT, GENERATIONS, GenerationChooser, choose_generations
from .report import Funnel, Report
from .sources import (
    MATH_TEST_SETS,
    PROMPT_COLUMNS,
    SOLUTION_COLUMNS,
    answers_of,
    describe,
    find_column,
    load_test_set,
    load_tokenizer,
    parse_test_set,
)


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

_LEVEL = re.compile(r"(?:level\s*)?(\d+)", re.IGNORECASE)


@dataclass
class PromptArguments:
    """
    Arguments of `mentor-trl data math`, `gsm8k`, `openr1` and `custom`, which differ in their defaults.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, `.json`, `.jsonl`, `.parquet` or `.csv` file, or folder of the problems.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of the problems.
        prompt_column (`str`, *optional*):
            Column of the problem: text, or a list of messages. If not set, the first of the usual names.
        solution_column (`str`, *optional*):
            Column of the answer, or of a worked solution with `\\boxed{}`. If not set, the first of the usual names.
        solution_delimiter (`str`, *optional*):
            If set, the answer is what follows the last occurrence of this text (`"####"` for GSM8K).
        trajectory_column (`str`, *optional*):
            Column of an expert's whole response, which becomes `trajectory`.
        generations (`bool`, *optional*, defaults to `False`):
            Whether the rows have the columns `generations` and `correctness_math_verify` of OpenR1-Math, of which the
            first correct, complete and short enough one becomes `trajectory`.
        all_generations (`bool`, *optional*, defaults to `False`):
            Whether to keep all such generations, in the column `trajectories`.
        max_response_tokens (`int`, *optional*, defaults to `4096`):
            Tokens that a generation may have.
        level_column (`str`, *optional*):
            Column of the level: a number, or text such as "Level 5".
        levels (`list[int]`, *optional*):
            Levels to keep. If not set, all rows.
        keep_columns (`list[str]`, *optional*):
            Further columns to keep as they are.
        test_sets (`list[str]`, *optional*):
            Test sets whose problems are left out: names, `NAME=PATH`, or paths and Hub ids. `none` for none.
        eval_set (`str`, *optional*):
            Test set that becomes the split `test`; the training rows never overlap with it. `none` for none.
        keep_duplicates (`bool`, *optional*, defaults to `False`):
            Whether to keep problems that occurred before. They are counted in any case.
        verifiable_only (`bool`, *optional*, defaults to `False`):
            Whether to drop rows whose answer cannot be graded, which `accuracy_reward` would skip.
        tokenizer (`str`, *optional*):
            Hub id or folder of the tokenizer that measures lengths.
        max_prompt_tokens (`int`, *optional*):
            Tokens that a prompt may have, chat template included. Needs `tokenizer`.
        max_samples (`int`, *optional*):
            Number of rows to keep in the end, from the first one.
        system_prompt (`str`, *optional*, defaults to `"mentor"`):
            System prompt, `mentor` for the MENTOR paper's, `none` for none.
        conversational (`bool`, *optional*, defaults to `True`):
            Whether prompts are messages (`True`) or text (`False`).
        num_proc (`int`, *optional*):
            Number of processes that measure generations.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, .json, .jsonl, .parquet or .csv file, or folder of the problems."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the problems."})
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the problem: text, or a list of messages. If not set, the first of the usual names."
        },
    )
    solution_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the answer, or of a worked solution with \\boxed{}. If not set, the first of the usual "
            "names."
        },
    )
    solution_delimiter: str | None = field(
        default=None,
        metadata={"help": "If set, the answer is what follows the last occurrence of this text (`####` for GSM8K)."},
    )
    trajectory_column: str | None = field(
        default=None, metadata={"help": "Column of an expert's whole response, which becomes `trajectory`."}
    )
    generations: bool = field(
        default=False,
        metadata={
            "help": "Whether the rows have the columns `generations` and `correctness_math_verify` of OpenR1-Math, of "
            "which the first correct, complete and short enough one becomes `trajectory`."
        },
    )
    all_generations: bool = field(
        default=False, metadata={"help": "Whether to keep all such generations, in the column `trajectories`."}
    )
    max_response_tokens: int = field(default=4096, metadata={"help": "Tokens that a generation may have."})
    level_column: str | None = field(
        default=None, metadata={"help": 'Column of the level: a number, or text such as "Level 5".'}
    )
    levels: list[int] | None = field(default=None, metadata={"help": "Levels to keep. If not set, all rows."})
    keep_columns: list[str] | None = field(default=None, metadata={"help": "Further columns to keep as they are."})
    test_sets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Test sets whose problems are left out: names, NAME=PATH, or paths and Hub ids. `none` for none."
        },
    )
    eval_set: str | None = field(
        default=None,
        metadata={
            "help": "Test set that becomes the split `test`; the training rows never overlap with it. `none` for none."
        },
    )
    keep_duplicates: bool = field(
        default=False,
        metadata={"help": "Whether to keep problems that occurred before. They are counted in any case."},
    )
    verifiable_only: bool = field(
        default=False,
        metadata={"help": "Whether to drop rows whose answer cannot be graded, which `accuracy_reward` would skip."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer that measures lengths."}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that a prompt may have, chat template included. Needs `tokenizer`."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Number of rows to keep in the end, from the first one."}
    )
    system_prompt: str | None = field(
        default="mentor",
        metadata={"help": "System prompt, `mentor` for the MENTOR paper's, `none` for none."},
    )
    conversational: bool = field(
        default=True, metadata={"help": "Whether prompts are messages (true) or text (false)."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that measure generations."})


PRESETS: dict[str, dict[str, Any]] = {
    # The 12,000 problems of MATH outside MATH-500, with the level of each.
    "math": {
        "dataset_name": "nlile/hendrycks-MATH-benchmark",
        "prompt_column": "problem",
        "level_column": "level",
        "levels": [3, 4, 5],
        "test_sets": MATH_TEST_SETS,
        "eval_set": "math500",
    },
    "openr1": {
        "dataset_name": "open-r1/OpenR1-Math-220k",
        "dataset_config": "default",
        "prompt_column": "problem",
        "solution_column": "answer",
        "generations": True,
        "tokenizer": "open-r1/OpenR1-Qwen-7B",
        "test_sets": MATH_TEST_SETS,
        "eval_set": "math500",
    },
    "gsm8k": {
        "dataset_name": "openai/gsm8k",
        "dataset_config": "main",
        "prompt_column": "question",
        "solution_column": "answer",
        "solution_delimiter": "####",
        "test_sets": ["gsm8k"],
        "eval_set": "gsm8k",
    },
    "custom": {},
}
"""Defaults of each command, by its name."""


def prepare_prompts(args: PromptArguments) -> "tuple[DatasetDict, Report]":
    """
    Make a prompt dataset.

    Args:
        args ([`PromptArguments`]):
            Where the problems are and which of them are kept.

    Returns:
        `tuple[DatasetDict, Report]`: the split `train`, and `test` where there is an evaluation set, with the columns
        `prompt`, `solution`, `source` and, where known, `level`, `trajectory` and `trajectories`; and the account of
        the rows.

    Raises:
        [`~mentor_trl.data.DataError`]: naming the option or row that is wrong.
    """
    from datasets import DatasetDict

    args = dataclasses.replace(args)  # columns that are found are filled in
    name = _check_arguments(args)
    rows = select_split(load_dataset_dict(args.dataset_name, args.dataset_config), args.dataset_split, "dataset_split")
    if len(rows) == 0:
        raise DataError(f"There are no rows in {name}; check the file, or choose another split")
    tests = {} if _is_none(args.eval_set) else {"eval_set": [args.eval_set]}
    tests["test_sets"] = [] if _is_none(args.test_sets) else args.test_sets
    tokenizer = load_tokenizer(args.tokenizer) if _measures(args) else None

    funnel = Funnel(rows)
    _find_columns(funnel, args, name)
    _keep_levels(funnel, args, name)
    _keep_usable(funnel)
    eval_rows = _drop_test_problems(funnel, tests)
    _drop_duplicates(funnel, args)
    if args.generations:
        _keep_generations(funnel, args, tokenizer)
    _count_ungradable(funnel, drop=args.verifiable_only)
    train = None if not funnel.report.kept else _keep_short(funnel, args, tokenizer, name)
    if not funnel.report.kept:
        raise DataError(f"No row of {name} is left:\n{funnel.report.markdown()}")
    splits = {"train": train}
    if eval_rows is not None:
        splits["test"] = _build_eval(eval_rows, args)
        funnel.report.facts.append(("rows of the split `test`", f"{len(splits['test']):,} ({args.eval_set})"))
    return DatasetDict(splits), funnel.report


def _is_none(value: str | list[str] | None) -> bool:
    return value is None or value in ("none", ["none"], [])


def _measures(args: PromptArguments) -> bool:
    return args.generations or args.max_prompt_tokens is not None


def _check_arguments(args: PromptArguments) -> str:
    if not args.dataset_name:
        raise DataError("No dataset is given; set `dataset_name` to a Hub id, a file or a folder")
    for option in ("max_response_tokens", "max_prompt_tokens", "max_samples"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise DataError(f"`{option}` is {value}; it must be 1 or more")
    if _measures(args) and not args.tokenizer:
        option = "generations" if args.generations else "max_prompt_tokens"
        raise DataError(f"`{option}` counts tokens; set `tokenizer` to the Hub id or folder of the policy's tokenizer")
    if args.all_generations and not args.generations:
        raise DataError("`all_generations` needs `generations`; set both, or neither")
    if args.generations and args.trajectory_column:
        raise DataError("`trajectory_column` and `generations` both say what becomes `trajectory`; set one of them")
    return f"{args.dataset_name} (split '{args.dataset_split}')"


def _find_columns(funnel: Funnel, args: PromptArguments, name: str) -> None:
    """Fill the funnel with what is looked at row by row: `problem`, `answer`, `key` and `level`."""
    dataset, present = funnel.dataset, funnel.dataset.column_names
    args.prompt_column = find_column(present, args.prompt_column, PROMPT_COLUMNS, "prompt_column", name)
    args.solution_column = find_column(present, args.solution_column, SOLUTION_COLUMNS, "solution_column", name)
    needed = {"trajectory_column": [args.trajectory_column], "keep_columns": args.keep_columns or []}
    needed["generations"] = [GENERATIONS, CORRECT] if args.generations else []
    for option, columns in needed.items():
        for column in columns:
            if column is not None:
                find_column(present, column, (), option, name)
    problems = [problem_text(prompt) for prompt in dataset[args.prompt_column]]
    answers = answers_of(dataset[args.solution_column], args.solution_delimiter)
    funnel.columns = {"problem": problems, "answer": answers, "key": [normalize_problem(text) for text in problems]}
    if args.level_column:
        column = find_column(present, args.level_column, (), "level_column", name)
        funnel.columns["level"] = [parse_level(value) for value in dataset[column]]


def parse_level(value: Any) -> int | None:
    """
    Return the level that a cell names, or `None` where it names none.

    >>> parse_level("Level 5"), parse_level(3), parse_level("Level ?")
    (5, 3, None)
    """
    match = _LEVEL.fullmatch(str(value).strip())
    return int(match[1]) if match else None


def _keep_levels(funnel: Funnel, args: PromptArguments, name: str) -> None:
    if not args.levels:
        return
    if "level" not in funnel.columns:
        raise DataError("`levels` needs the column of the level; set `level_column`")
    counts = Counter(funnel.columns["level"])
    known = sorted(level for level in counts if level is not None)
    absent = sorted(set(args.levels) - set(known))
    if absent:
        raise DataError(
            f"`levels` names {absent}, and the column '{args.level_column}' of {name} has the levels {known} only; "
            "choose among those, or set `level_column` to another column"
        )
    funnel.keep("level unknown", [level is not None for level in funnel.columns["level"]])
    wanted = set(args.levels)
    funnel.keep(f"level not in {sorted(wanted)}", [level in wanted for level in funnel.columns["level"]])


def _keep_usable(funnel: Funnel) -> None:
    funnel.keep("no problem text", [bool(text.strip()) for text in funnel.columns["problem"]])
    funnel.keep("no answer", [answer is not None for answer in funnel.columns["answer"]])


def _drop_test_problems(funnel: Funnel, tests: dict[str, list[str]]) -> "Dataset | None":
    eval_rows, seen = None, {}
    for option, specs in tests.items():
        for spec in specs:
            name, test_set = parse_test_set(spec, option)
            # A name alone means the set that was given a path before.
            if test_set in seen.values() or (spec == name and name in seen):
                continue
            seen[name] = test_set
            rows = load_test_set(name, test_set, option)
            column = find_column(rows.column_names, None, _first(test_set.prompt_column, PROMPT_COLUMNS), option, name)
            keys = {normalize_problem(problem_text(prompt)) for prompt in rows[column]}
            funnel.report.facts.append((f"test set {name}", describe(test_set)))
            step = f"problem of {name} ({len(keys):,} problems)"
            funnel.keep(step, [key not in keys for key in funnel.columns["key"]])
            if option == "eval_set":
                eval_rows = rows
    return eval_rows


def _first(name: str | None, names: tuple[str, ...]) -> tuple[str, ...]:
    return names if name is None else (name, *names)


def _drop_duplicates(funnel: Funnel, args: PromptArguments) -> None:
    first, answers = {}, {}
    for index, (key, answer) in enumerate(zip(funnel.columns["key"], funnel.columns["answer"])):
        first.setdefault(key, index)
        answers.setdefault(key, set()).add(answer)
    number = len(funnel.columns["key"]) - len(first)
    conflicts = sum(len(different) > 1 for different in answers.values())
    if number:
        kept = "kept" if args.keep_duplicates else "dropped, the first of each kept"
        funnel.report.facts.append(("rows whose problem occurred before", f"{number:,} ({kept})"))
        funnel.report.facts.append(("problems that occur with different answers", f"{conflicts:,}"))
    if not args.keep_duplicates:
        keys = funnel.columns["key"]
        funnel.keep("problem occurred before", [first[key] == index for index, key in enumerate(keys)])


def _keep_generations(funnel: Funnel, args: PromptArguments, tokenizer: "PreTrainedTokenizerBase") -> None:
    if not funnel.report.kept:
        return
    if COMPLETE not in funnel.dataset.column_names:
        funnel.report.facts.append((f"column `{COMPLETE}`", "absent, so that no generation was dropped for it"))
    chooser = GenerationChooser(tokenizer, args.max_response_tokens)
    choice = choose_generations(funnel.dataset, chooser, args.num_proc)
    funnel.columns["chosen"] = list(choice["chosen"])
    funnel.drop(list(choice["reason"]), chooser.reasons)
    number = sum(len(chosen) for chosen in funnel.columns["chosen"])
    funnel.report.facts.append(("generations that pass, over all rows", f"{number:,}"))


def _count_ungradable(funnel: Funnel, drop: bool) -> None:
    from mentor_trl.rewards import ungradable

    answers = funnel.columns["answer"]
    indices = set(ungradable(answers))
    if drop:
        funnel.keep("answer that math-verify cannot parse", [index not in indices for index in range(len(answers))])
    else:
        funnel.report.facts.append(("answers that cannot be graded", f"{len(indices):,}"))


def _keep_short(
    funnel: Funnel, args: PromptArguments, tokenizer: "PreTrainedTokenizerBase | None", name: str
) -> "Dataset":
    dataset = _build(funnel, args, name)
    if args.max_prompt_tokens is not None:
        short = [length <= args.max_prompt_tokens for length in prompt_lengths(dataset["prompt"], tokenizer)]
        funnel.keep(f"prompt of more than {args.max_prompt_tokens:,} tokens", short)
        dataset = dataset.select([index for index, keep in enumerate(short) if keep])
    if args.max_samples is not None and len(dataset) > args.max_samples:
        funnel.report.steps.append((f"beyond the first {args.max_samples:,}", len(dataset) - args.max_samples))
        dataset = dataset.select(range(args.max_samples))
    _add_facts(funnel.report, dataset)
    return dataset


def prompt_lengths(prompts: list[str | list[dict]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Number of tokens of each prompt, as the trainer renders it."""
    return [len(ids) for ids in render_prompts(prompts, tokenizer)]


def render_prompts(prompts: list[str | list[dict]], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """
    Return the token ids of prompts as `GRPOTrainer` makes them.

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts, as text or as messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer; messages need its chat template.
    """
    prompts = list(prompts)
    if not prompts or isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"] if prompts else []
    if not tokenizer.chat_template:
        raise DataError(
            f"The prompts are messages, and the tokenizer {tokenizer.name_or_path!r} has no chat template; take "
            "another tokenizer, or make the prompts with `conversational` false"
        )
    # Arrow gives every message the keys of all of them; absent ones come back as None.
    prompts = [[{k: v for k, v in message.items() if v is not None} for message in prompt] for prompt in prompts]
    rendered = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return rendered["input_ids"]


def _build(funnel: Funnel, args: PromptArguments, name: str) -> "Dataset":
    columns, source = funnel.columns, _source(args.dataset_name)

    def row_of(row: dict[str, Any], index: int) -> dict[str, Any]:
        built = {"prompt": row[args.prompt_column], "solution": columns["answer"][index]}
        built["source"] = f"{source}/{row['source']}" if row.get("source") else source
        if "level" in columns:
            built["level"] = columns["level"][index]
        if args.generations:
            texts = [row[GENERATIONS][i] for i in columns["chosen"][index]]
            built["trajectory"] = texts[0]
            built |= {"trajectories": texts} if args.all_generations else {}
        elif args.trajectory_column:
            built["trajectory"] = row[args.trajectory_column] or None
        return built | {column: row[column] for column in args.keep_columns or []}

    dataset = funnel.dataset.map(
        row_of,
        with_indices=True,
        remove_columns=funnel.dataset.column_names,
        features=_features(funnel, args),
        load_from_cache_file=False,
        desc="Building rows",
    )
    return build_prompt_dataset(dataset, **_prompt_options(args), name=name)


def _features(funnel: Funnel, args: PromptArguments):
    from datasets import Features, List, Value

    given, text = funnel.dataset.features, Value("string")
    features = Features({"prompt": given[args.prompt_column], "solution": text, "source": text})
    if "level" in funnel.columns:
        features["level"] = Value("int64")
    if args.generations or args.trajectory_column:
        features["trajectory"] = text
    if args.all_generations:
        features["trajectories"] = List(text)
    return Features({**features, **{column: given[column] for column in args.keep_columns or []}})


def _source(name: str) -> str:
    path = Path(name).expanduser()
    return path.name if path.exists() else name


def _prompt_options(args: PromptArguments) -> dict[str, Any]:
    system_prompt = None if args.system_prompt in (None, "", "none") else args.system_prompt
    system_prompt = MENTOR_SYSTEM_PROMPT if system_prompt == "mentor" else system_prompt
    return {"system_prompt": system_prompt, "conversational": args.conversational}


def _build_eval(rows: "Dataset", args: PromptArguments) -> "Dataset":
    from datasets import Dataset

    name, test_set = parse_test_set(args.eval_set, "eval_set")
    prompts = find_column(rows.column_names, None, _first(test_set.prompt_column, PROMPT_COLUMNS), "eval_set", name)
    names = _first(test_set.solution_column, SOLUTION_COLUMNS)
    solutions = rows[find_column(rows.column_names, None, names, "eval_set", name)]
    answers = answers_of(solutions, test_set.solution_delimiter)
    if None in answers:
        raise DataError(
            f"Row {answers.index(None)} of the evaluation set '{name}' has no answer; mend the row, or set `eval_set` "
            "to another test set or to none"
        )
    built = {"prompt": list(rows[prompts]), "solution": answers, "source": [name] * len(answers)}
    if "level" in rows.column_names:
        built["level"] = [parse_level(value) for value in rows["level"]]
    return build_prompt_dataset(Dataset.from_dict(built), **_prompt_options(args), name=f"the test set {name}")


def _add_facts(report: Report, dataset: "Dataset") -> None:
    from mentor_trl.rewards.accuracy import format_reward

    if "level" in dataset.column_names:
        counts = Counter(dataset["level"])
        known = sorted(level for level in counts if level is not None)
        counted = [f"level {level}: {counts[level]:,}" for level in known]
        counted += [f"unknown: {counts[None]:,}"] if None in counts else []
        report.facts.append(("rows by level", ", ".join(counted)))
    if "trajectory" in dataset.column_names:
        present = formed = 0
        for batch in dataset.select_columns("trajectory").iter(batch_size=1000):
            texts = [text for text in batch["trajectory"] if text is not None]
            present, formed = present + len(texts), formed + int(sum(format_reward(texts)))
        report.facts.append(("rows with a trajectory", f"{present:,}"))
        report.facts.append(("of these in the form `<think>...</think>...\\boxed{...}`", f"{formed:,}"))
