"""From a source of problems to a prompt dataset: columns, levels, test sets, duplicates and lengths."""

import dataclasses
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.rewards import format_reward, ungradable

from ..cells import cell, column_paths, find_column, text_of, widen
from ..loading import DataError
from ..problems import ANSWER_COLUMNS, QUESTION_COLUMNS, TEST_SETS, build_problem
from ..rows import build_prompt_dataset, prompt_text
from .account import Funnel, Report
from .matching import normalize_problem
from .openr1 import CORRECT, GENERATIONS, keep_generations
from .settings import PromptArguments
from .sources import (
    ALIASES,
    answers_of,
    check_counts,
    load_rows,
    load_test_set,
    load_tokenizer,
    name_of,
    parse_test_set,
    render_prompts,
)


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

MADE = ("prompt", "solution", "source", "level", "trajectory", "trajectories")
_LEVEL = re.compile(r"(?:level\s*)?(\d+)(?:\.0)?", re.IGNORECASE)


def prepare_prompts(args: PromptArguments) -> "tuple[DatasetDict, Report]":
    """Make a prompt dataset: the split `train`, and `test` where there is an evaluation set."""
    from datasets import DatasetDict

    args = dataclasses.replace(args)  # columns that are found are filled in
    _check_arguments(args)
    _, rows = load_rows(args)
    name = name_of(args)
    tokenizer = load_tokenizer(args.tokenizer) if _measures(args) else None

    funnel = Funnel(rows)
    _find_columns(funnel, args, name)
    _keep_levels(funnel, args, name)
    funnel.keep("no problem text", [bool(text.strip()) for text in funnel.columns["problem"]])
    funnel.keep("no answer", [answer is not None for answer in funnel.columns["answer"]])
    eval_rows = _drop_test_problems(funnel, args)
    _drop_duplicates(funnel, args)
    if args.generations:
        keep_generations(funnel, tokenizer, args.max_response_tokens, args.num_proc)
    if args.verifiable_only:
        bad = set(ungradable(funnel.columns["answer"]))
        funnel.keep("answer that math-verify cannot parse", [i not in bad for i in range(funnel.report.kept)])
    if funnel.report.kept:
        _build(funnel, args, name)
        _keep_short(funnel, args, tokenizer)
    if not funnel.report.kept:
        steps = ", ".join(f"{step} ({dropped:,})" for step, dropped in funnel.report.steps if dropped)
        raise DataError(f"No row of {name} is left of {funnel.report.loaded:,}; dropped were: {steps}")
    _add_facts(funnel)
    splits = DatasetDict({"train": funnel.dataset})
    if eval_rows is not None:
        splits["test"] = _build_eval(eval_rows, args)
        funnel.report.facts.append(("rows of the split `test`", f"{len(splits['test']):,} ({args.eval_set})"))
    return splits, funnel.report


def _measures(args: PromptArguments) -> bool:
    return args.generations or args.max_prompt_tokens is not None


def _check_arguments(args: PromptArguments) -> None:
    check_counts(args, "max_response_tokens", "max_prompt_tokens", "max_samples", "num_proc")
    if _measures(args) and not args.tokenizer:
        option = "generations" if args.generations else "max_prompt_tokens"
        raise DataError(f"`{option}` counts tokens; set `tokenizer` to the Hub id or folder of the policy's tokenizer")
    if args.all_generations and not args.generations:
        raise DataError("`all_generations` needs `generations`; set both, or neither")
    if args.generations and args.trajectory_column:
        raise DataError("`trajectory_column` and `generations` both say what becomes `trajectory`; set one of them")
    made = next((column for column in args.keep_columns or [] if column in MADE), None)
    if made is not None:
        raise DataError(
            f"`keep_columns` names '{made}', a column that is made here; rename that of the source, or drop it"
        )


def _find_columns(funnel: Funnel, args: PromptArguments, name: str) -> None:
    """Fill the funnel with what is looked at row by row: `problem`, `answer`, `key` and `level`."""
    dataset, present = funnel.dataset, column_paths(funnel.dataset)

    def find(option: str, usual: tuple[str, ...] = ()) -> str:
        given = getattr(args, option)
        return find_column(present, (given,) if given else usual, option, name, near=usual)

    args.prompt_column = find("prompt_column", QUESTION_COLUMNS)
    args.solution_column = find("solution_column", ANSWER_COLUMNS)
    if args.trajectory_column:
        find("trajectory_column")
    for column in args.keep_columns or []:
        find_column(present, (column,), "keep_columns", name)
    for column in [GENERATIONS, CORRECT] if args.generations else []:
        find_column(present, (column,), "generations", name)

    def cells(path: str) -> list[Any]:
        column = path if path in dataset.column_names else path.partition(".")[0]
        return [cell(row, path) for row in dataset.select_columns(column)]

    funnel.dataset = dataset = widen(dataset, args.solution_column)
    prompts = cells(args.prompt_column)
    problems = [prompt_text(prompt, f"row {index} of {name}") for index, prompt in enumerate(prompts)]
    place = f"column '{args.solution_column}' of {name}"
    answers = answers_of(cells(args.solution_column), args.solution_delimiter, place)
    funnel.columns = {"problem": problems, "answer": answers, "key": [normalize_problem(text) for text in problems]}
    if args.level_column:
        funnel.columns["level"] = [parse_level(value) for value in cells(find("level_column"))]


def parse_level(value: Any) -> int | None:
    """
    Return the level that a cell names, or `None`.

    >>> parse_level("Level 5"), parse_level(3), parse_level(3.0), parse_level("Level ?")
    (5, 3, 3, None)
    """
    match = _LEVEL.fullmatch(str(value).strip())
    return int(match[1]) if match else None


def _keep_levels(funnel: Funnel, args: PromptArguments, name: str) -> None:
    if not args.levels:
        return
    if "level" not in funnel.columns:
        raise DataError("`levels` needs the column of the level; set `level_column`")
    wanted, known = set(args.levels), set(funnel.columns["level"]) - {None}
    absent = sorted(wanted - known)
    if absent:
        raise DataError(
            f"`levels` names {absent}, and the column '{args.level_column}' of {name} has the levels {sorted(known)}; "
            "choose among those, or set `level_column` to another column"
        )
    funnel.keep("level unknown", [level is not None for level in funnel.columns["level"]])
    funnel.keep(f"level not in {sorted(wanted)}", [level in wanted for level in funnel.columns["level"]])


def _drop_test_problems(funnel: Funnel, args: PromptArguments) -> "Dataset | None":
    specs = [("eval_set", args.eval_set), *(("test_sets", spec) for spec in args.test_sets or [])]
    specs = [(option, spec) for option, spec in specs if spec not in (None, "none")]
    eval_rows, seen = None, {}
    for option, spec in specs:
        name, test_set = parse_test_set(spec, option)
        # A name alone means the set that was given a path before.
        if test_set in seen.values() or (name in seen and spec in (*TEST_SETS, *ALIASES)):
            continue
        seen[name] = test_set
        rows = load_test_set(name, test_set, option)
        column = find_column(rows.column_names, QUESTION_COLUMNS, option, name)
        keys = {normalize_problem(prompt_text(prompt)) for prompt in rows[column]}
        parts = [part if key == "path" else f"{key} {part}" for key, part in test_set.on_hub.items()]
        funnel.report.facts.append((f"test set {name}", ", ".join(parts)))
        step = f"problem of {name} ({len(keys):,} problems)"
        funnel.keep(step, [key not in keys for key in funnel.columns["key"]])
        eval_rows = rows if option == "eval_set" else eval_rows
    return eval_rows


def _drop_duplicates(funnel: Funnel, args: PromptArguments) -> None:
    keys, first, answers = funnel.columns["key"], {}, defaultdict(set)
    for index, (key, answer) in enumerate(zip(keys, funnel.columns["answer"])):
        first.setdefault(key, index)
        answers[key].add(answer)
    if len(keys) > len(first):
        kept = "kept" if args.keep_duplicates else "dropped, the first of each kept"
        conflicts = sum(len(different) > 1 for different in answers.values())
        funnel.report.facts.append(("rows whose problem occurred before", f"{len(keys) - len(first):,} ({kept})"))
        funnel.report.facts.append(("problems that occur with different answers", f"{conflicts:,}"))
    if not args.keep_duplicates:
        funnel.keep("problem occurred before", [first[key] == index for index, key in enumerate(keys)])


def _keep_short(funnel: Funnel, args: PromptArguments, tokenizer: "PreTrainedTokenizerBase | None") -> None:
    if args.max_prompt_tokens is not None:
        lengths = map(len, render_prompts(funnel.dataset["prompt"], tokenizer))
        step = f"prompt of more than {args.max_prompt_tokens:,} tokens"
        funnel.keep(step, [length <= args.max_prompt_tokens for length in lengths])
    if args.max_samples is not None and len(funnel.dataset) > args.max_samples:
        first = [index < args.max_samples for index in range(len(funnel.dataset))]
        funnel.keep(f"beyond the first {args.max_samples:,}", first)


def _build(funnel: Funnel, args: PromptArguments, name: str) -> None:
    from datasets import Features, List, Value

    columns, path = funnel.columns, Path(args.dataset_name).expanduser()
    source = path.name if path.exists() else args.dataset_name

    given, text = funnel.dataset.features, Value("string")
    features = {"prompt": cell(given, args.prompt_column), "solution": text, "source": text}
    if "level" in columns:
        features["level"] = Value("int64")
    if args.generations or args.trajectory_column:
        features["trajectory"] = text
    if args.all_generations:
        features["trajectories"] = List(text)
    features |= {column: cell(given, column) for column in args.keep_columns or []}

    def row_of(row: dict[str, Any], index: int) -> dict[str, Any]:
        built = {name: cell(row, name) for name in args.keep_columns or []}
        built |= {"prompt": cell(row, args.prompt_column), "solution": columns["answer"][index]}
        built["source"] = f"{source}/{row['source']}" if row.get("source") else source
        if "level" in columns:
            built["level"] = columns["level"][index]
        if args.generations:
            built["trajectories"] = [row[GENERATIONS][i] for i in columns["chosen"][index]]
            built["trajectory"] = built["trajectories"][0]
        elif args.trajectory_column:
            where = f"The trajectory (column '{args.trajectory_column}') of row {index} of those kept of {name}"
            built["trajectory"] = text_of(cell(row, args.trajectory_column), where)
        return {column: built[column] for column in features}

    dataset = funnel.dataset.map(
        row_of,
        with_indices=True,
        remove_columns=funnel.dataset.column_names,
        features=Features(features),
        load_from_cache_file=False,
        desc="Building rows",
    )
    funnel.dataset = build_prompt_dataset(dataset, **_prompt_options(args), name=name)


def _prompt_options(args: PromptArguments) -> dict[str, Any]:
    system_prompt = None if args.system_prompt == "none" else args.system_prompt
    return {"system_prompt": system_prompt, "conversational": args.conversational}


def _build_eval(rows: "Dataset", args: PromptArguments) -> "Dataset":
    from datasets import Dataset

    name, test_set = parse_test_set(args.eval_set, "eval_set")
    if test_set.form != "short_answer":
        problems = [build_problem(test_set.form, row, index, name) for index, row in enumerate(rows)]
        prompts, answers = [row["question"] for row in problems], [row["answer"] for row in problems]
    else:
        prompts = list(rows[find_column(rows.column_names, QUESTION_COLUMNS, "eval_set", name)])
        column = find_column(rows.column_names, ANSWER_COLUMNS, "eval_set", name)
        answers = answers_of(rows[column], None, f"column '{column}' of {name}")
    if None in answers:
        raise DataError(
            f"Row {answers.index(None)} of the evaluation set '{name}' has no answer; fix the row, or set `eval_set` "
            "to another test set or to none"
        )
    built = {"prompt": prompts, "solution": answers, "source": [name] * len(answers)}
    if "level" in rows.column_names:
        built["level"] = [parse_level(value) for value in rows["level"]]
    return build_prompt_dataset(Dataset.from_dict(built), **_prompt_options(args), name=f"the test set {name}")


def _add_facts(funnel: Funnel) -> None:
    report, dataset = funnel.report, funnel.dataset
    if "level" in dataset.column_names:
        counts = sorted(Counter(dataset["level"]).items(), key=lambda item: (item[0] is None, item[0]))
        names = (f"{'unknown' if level is None else f'level {level}'}: {number:,}" for level, number in counts)
        report.facts.append(("rows by level", ", ".join(names)))
    if "trajectory" in dataset.column_names:
        texts = [text for text in dataset["trajectory"] if text is not None]
        report.facts.append(("rows with a trajectory", f"{len(texts):,}"))
        formed = f"{int(sum(format_reward(texts))):,}"
        report.facts.append(("of these in the form `<think>...</think>...\\boxed{...}`", formed))
