"""What is checked before a run, and what is said about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.preparation.sources import render_prompts
from ..errors import SetupError
from ..experts.compatibility import check_context, check_stop_ids, check_vocabulary, stop_token_ids
from ..rewards import ungradable
from ..rollout.host import longest_prompt
from .memory import Load, shown
from .models import ModelFacts


# Solutions that are looked at
GRADED = 1000
OWN_REWARD = (
    "Name the column with --dataset_solution_column, or your own function with --reward_funcs my_module.my_reward."
)
MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "no": ("NO", "bold red")}


@dataclass(frozen=True)
class Check:
    """A line of the table: what was looked at, what was found, `"ok"`, `"note"` or `"no"`, and what to do."""

    what: str
    found: str
    verdict: str = "ok"
    advice: str = ""


def checked(what: str, check: Callable[[], Any], found: str) -> Check:
    """A check that raises a [`SetupError`] where something is wrong."""
    try:
        check()
    except SetupError as error:
        return Check(what, "does not fit", "no", str(error))
    return Check(what, found)


def check_pair(policy: ModelFacts, expert: ModelFacts, extend: bool) -> list[Check]:
    """Whether an expert has the policy's tokens and ends."""
    size = len(policy.tokenizer.get_vocab())
    vocabulary = lambda: check_vocabulary(policy.model, expert.model, policy.tokenizer, expert.tokenizer)
    lines = [checked("vocabulary", vocabulary, f"the same {size:,} tokens")]
    if lines[0].verdict == "no":
        return lines
    stops = stop_token_ids(policy.model, policy.tokenizer), stop_token_ids(expert.model, expert.tokenizer)
    more = [index for index in stops[1] if index not in stops[0]]
    ends = f"{_tokens(policy, [*stops[0], *more])}{' (the expert has its own)' if more else ''}"
    lines.append(checked("stop tokens", lambda: check_stop_ids(*stops, expert.tokenizer, extend), ends))
    ours, theirs = (one.tokenizer.chat_template for one in (policy, expert))
    if ours and theirs and ours != theirs:
        advice = "The expert reads prompts in the policy's chat template, which is another than its own."
        lines.append(Check("chat template", "two different ones", "note", advice))
    elif ours:
        lines.append(Check("chat template", "the policy's"))
    else:
        lines.append(Check("chat template", "none: prompts are plain text"))
    return lines


def own_stops(policy: ModelFacts, expert: ModelFacts) -> bool:
    """Whether the expert ends completions with ids that do not end the policy's."""
    ours = stop_token_ids(policy.model, policy.tokenizer)
    return any(index not in ours for index in stop_token_ids(expert.model, expert.tokenizer))


def _tokens(model: ModelFacts, ids: Sequence[int]) -> str:
    return " ".join(map(str, model.tokenizer.convert_ids_to_tokens(list(ids))))


def prompt_length(policy: ModelFacts, dataset: Any) -> int:
    """Tokens of the longest prompt."""
    return longest_prompt(dataset, lambda prompts: render_prompts(prompts, policy.tokenizer))


def check_lengths(policy: ModelFacts, expert: ModelFacts | None, prompt: int, completion: int) -> Check:
    """Whether prompts and completions fit into the contexts."""
    models = {"policy": policy, "expert": expert}

    def check() -> None:
        for name, model in models.items():
            if model is not None:
                check_context([prompt], completion, model.context, f"the {name}'s", f"choose another {name}")

    limits = [model.context for model in models.values() if model is not None and model.context]
    limit = f" of {min(limits):,}" if limits else ""
    return checked("context", check, f"prompts up to {prompt:,}, completions {completion:,}{limit}")


def check_solutions(solutions: Sequence[Any], names: Sequence[str]) -> Check:
    """Whether `accuracy_reward` can grade the solutions."""
    rewards = ", ".join(name.rpartition(".")[2] for name in names)
    if "accuracy_reward" not in names:
        return Check("rewards", rewards)
    solutions = list(solutions[:GRADED])
    wrong = ungradable(solutions)
    if not wrong:
        return Check("rewards", f"{rewards}; {len(solutions):,} solutions can be graded")
    share = f"{rewards}; {len(wrong):,} of {len(solutions):,} solutions cannot be graded"
    row = f"row {wrong[0]}: {str(solutions[wrong[0]])[-60:]!r}"
    if len(wrong) == len(solutions):
        return Check("rewards", share, "no", f"No solution is an answer that can be compared ({row}). {OWN_REWARD}")
    return Check("rewards", share, "note", f"Nothing is learned from these by `accuracy_reward` ({row}).")


def check_memory(load: Load, limit: float, device: str, remedies: Sequence[str]) -> Check:
    """Whether a run fits into a device, by estimate."""
    parts = {name: size for name, size in load.parts().items() if size}
    found = f"about {shown(load.peak())} of {shown(limit)} on {device}"
    if load.peak() <= limit:
        return Check("memory", found)
    largest = sorted(parts.items(), key=lambda part: -part[1])
    where = ", ".join(f"{name} {shown(size)}" for name, size in largest[:4])
    return Check("memory", found, "no", f"The largest parts: {where}. To fit, {'; or '.join(remedies)}.")


def print_checks(checks: Sequence[Check], title: str, console: Console) -> None:
    """The table, and below it what to know or to change."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    for check in checks:
        table.add_row(check.what, Text(check.found), Text(*MARKS[check.verdict]))
    console.print(table)
    for check in checks:
        if check.advice:
            mark, style = MARKS[check.verdict]
            console.print(Text.assemble((f"{mark}: ", style), f"{check.what}: {check.advice}"), soft_wrap=False)


def refuse(checks: Sequence[Check], advice: str = "") -> None:
    """
    Raises:
        [`SetupError`]: if a check says no.
    """
    wrong = [check.what for check in checks if check.verdict == "no"]
    if wrong:
        raise SetupError(f"{', '.join(wrong)}: does not fit, as said above{advice}")
