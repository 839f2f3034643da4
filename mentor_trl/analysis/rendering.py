"""One rollout as text in which one sees where the expert spoke: for a terminal, and as a page of HTML."""

import html
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..rewards.answers import completion_text
from ..training.rollout_log import RolloutRecord, draw_rows, message_text


AGREED, REPLACED, CHOSEN = "agreed", "replaced", "chosen"
# Readable without colour as well: one is underlined, the other set in reverse. The colours are told apart by the
# colour-blind, differ in lightness, and are read on light and on dark terminals.
STYLES = {AGREED: "bold underline #2a8ad2", REPLACED: "bold #000000 on #e69f00", CHOSEN: "bold #000000 on #8fd0a5"}
BRACKETS = {AGREED: ("‹", "›"), REPLACED: ("«", "»"), CHOSEN: ("‹", "›")}
LEGEND = {
    AGREED: "branch point: the expert chose, and agreed with the draft",
    REPLACED: "branch point: the expert replaced the draft",
    CHOSEN: "branch point: the expert chose, and there was no draft",
}
SHORT_LEGEND = {AGREED: "agreed", REPLACED: "replaced the draft", CHOSEN: "chose"}

INDENT = 12  # of an excerpt, for the names of its parts


def mark(record: RolloutRecord, position: int) -> str | None:
    """What the expert did at a token: `"agreed"`, `"replaced"`, `"chosen"`, or `None`: it did not speak."""
    if not record.branch[position]:
        return None
    return {True: REPLACED, False: AGREED, None: CHOSEN}[record.replaced[position]]


def _marks(record: RolloutRecord) -> list[str]:
    """The marks that occur, in the order of their legend."""
    found = {mark(record, position) for position in range(len(record.tokens))}
    if CHOSEN in found:
        return [CHOSEN]
    return [AGREED, REPLACED]


def visible(text: str) -> str:
    """
    Text whose control characters are shown rather than obeyed; line breaks and tabs stay.

    >>> visible("a\\x1b[31mb")
    'a␛[31mb'
    """
    return "".join(map(_visible_character, text))


def summary(record: RolloutRecord) -> list[str]:
    """Lines that say what a rollout is: where it comes from, what it got, and how often the expert spoke."""
    facts = [f"step {record.step}", f"row {record.row}", f"source {record.source}", f"reward {_reward(record.reward)}"]
    facts.append(f"advantage {record.advantage:+.3f}")
    if record.gamma is not None:
        facts += [f"gamma {record.gamma:.3f} nats", f"alpha {record.alpha:.3f}"]
    tokens, branches = len(record.tokens), sum(record.branch)
    counts = [f"{tokens} tokens", f"{branches} branch points{_share(branches, tokens)}"]
    if None not in record.replaced:
        counts.append(f"{sum(record.replaced)} replaced{_share(sum(record.replaced), tokens)}")
    mean = [value for value in record.entropies if value is not None]
    counts.append(f"mean entropy {sum(mean) / len(mean):.3f} nats" if mean else "no entropies")
    return [" · ".join(facts), " · ".join(counts)]


def to_list(records: Sequence[RolloutRecord]) -> Table:
    """A line a rollout, to choose from."""
    table = Table(title=f"Rollouts of step {records[0].step}", title_justify="left", box=box.SIMPLE)
    for name in ("row", "source", "reward", "advantage", "tokens", "branch", "replaced"):
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
    table.add_column("completion", min_width=12)  # gives way where there is no room
    for record in records:
        facts = [str(record.row), record.source, _reward(record.reward), f"{record.advantage:+.3f}"]
        replaced = "" if None in record.replaced else str(sum(record.replaced))
        counts = [str(len(record.tokens)), str(sum(record.branch)), replaced]
        start = visible("".join(record.tokens)[:200].replace("\n", " "))
        table.add_row(*facts, *counts, Text(start, no_wrap=True, overflow="ellipsis"))
    return table


def print_rollout(record: RolloutRecord, console: Console) -> None:
    """Print with styles, or with brackets on a console without colours."""
    plain = console.color_system is None
    header, completion, legend = Text("\n".join(summary(record))), Text(), Text()
    for position, token in enumerate(record.tokens):
        kind = mark(record, position)
        completion.append_text(_marked(_shown(token, record.token_ids[position], kind), kind, plain))
    for kind in _marks(record):
        legend.append("\n").append_text(_marked("token", kind, plain)).append(f"  {LEGEND[kind]}")
    heading = lambda name: Text(f"\n{name}", style="bold")
    prompt = [heading("Prompt"), Text(visible(record.prompt))]
    parts = [header if plain else Panel(header), *prompt, heading("Completion"), completion, legend]
    console.print(Group(*parts), soft_wrap=plain)


@dataclass(frozen=True)
class Excerpt:
    """
    A rollout in few lines that fit any width, for Rich to print: its facts, the end of the prompt, and the completion
    with the tokens of the expert marked; the middle of a long one is left out.
    """

    facts: Sequence[str]
    prompt: str
    pieces: Sequence[tuple[str, str | None]]  # of the completion, with what the expert did there

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain, width = console.color_system is None, max(20, options.max_width - INDENT - 1)
        completion, legend = Text(), Text()
        for text, kind in self.pieces:
            completion.append_text(_marked(text, kind, plain))
        for kind in SHORT_LEGEND:
            if any(kind == other for _, other in self.pieces):
                legend.append("  " if legend else "").append_text(_marked(SHORT_LEGEND[kind], kind, plain))
        parts = {
            "rollout": _wrapped(Text(", ".join(self.facts)), console, width),
            "the expert": _wrapped(legend, console, width) if legend else [],
            "prompt": _wrapped(Text(visible(self.prompt.strip())), console, width, (1, 3)),
            "completion": _wrapped(completion, console, width, (16, 8)),
        }
        for name, lines in parts.items():
            for position, line in enumerate(lines):
                label = Text(("" if position else name).rjust(INDENT) + " ", style="" if plain else "bold", end="")
                whole = Text.assemble(label, line)
                whole.rstrip()
                yield whole


def excerpt(record: RolloutRecord) -> Excerpt:
    """An excerpt of a rollout."""
    tokens, kinds = len(record.tokens), [mark(record, position) for position in range(len(record.tokens))]
    facts = [
        f"step {record.step}",
        record.source,
        f"reward {_reward(record.reward)}",
        f"advantage {record.advantage:+.3f}",
    ]
    facts.append(f"{tokens} tokens")
    spoken = len(kinds) - kinds.count(None)
    if spoken:
        facts.append(f"{spoken} by the expert{_share(spoken, tokens)}")
    if REPLACED in kinds:
        facts.append(f"{kinds.count(REPLACED)} replaced{_share(kinds.count(REPLACED), tokens)}")
    pieces = map(_shown, record.tokens, record.token_ids, kinds)
    return Excerpt(facts, record.prompt, list(zip(pieces, kinds)))


def evaluation_excerpts(logs: dict[str, Any], count: int, step: int) -> list[Excerpt]:
    """Excerpts of rows, drawn at random, of the completions table of an evaluation."""
    found = []
    for row in draw_rows(["eval"] * len(logs["prompt"]), count, step):
        rewards = {name: values[row] for name, values in logs["rewards"].items()}
        facts = [f"evaluation at step {step}", *(f"{name} {_reward(value)}" for name, value in rewards.items())]
        completion = visible(completion_text(logs["completion"][row]))
        found.append(Excerpt(facts, message_text(logs["prompt"][row]), [(completion, None)]))
    return found


def to_svg(records: Sequence[RolloutRecord], title: str = "Rollouts", width: int = 80) -> str:
    """Draw what a terminal of `width` characters shows of [`print_rollout`]."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for record in records:
        print_rollout(record, console)
    return console.export_svg(title=title, unique_id="rollout")


def to_html(records: Sequence[RolloutRecord], title: str = "Rollouts") -> str:
    """Render as one page of HTML that needs no other file; a token's title, shown on hover, holds its numbers."""
    template = Template(resources.files("mentor_trl.analysis").joinpath("rollout.html").read_text(encoding="utf-8"))
    kinds = sorted({kind for record in records for kind in _marks(record)}, key=list(LEGEND).index)
    legend = "".join(f'<span><span class="t {kind}">token</span> {html.escape(LEGEND[kind])}</span>' for kind in kinds)
    sections = "\n".join(map(_section, records)).strip()
    return template.substitute(title=html.escape(title), legend=legend, rollouts=sections)


def _section(record: RolloutRecord) -> str:
    facts = "".join(f"<p>{html.escape(line)}</p>" for line in summary(record))
    tokens = "".join(_token(record, position) for position in range(len(record.tokens)))
    return (
        f'<section><div class="facts">{facts}</div>'
        f'<h2>Prompt</h2><pre class="prompt">{html.escape(visible(record.prompt))}</pre>'
        f'<h2>Completion</h2><pre class="completion">{tokens}</pre></section>'
    )


def _token(record: RolloutRecord, position: int) -> str:
    kind = mark(record, position)
    text = html.escape(_shown(record.tokens[position], record.token_ids[position], kind))
    classes = f"t {kind}" if kind else "t"
    entropy, highest = record.entropies[position], record.gamma or 2.0
    shade = 0.0 if entropy is None else min(1.0, entropy / highest)
    title = html.escape(_numbers(record, position), quote=True)
    return f'<span class="{classes}" style="--h:{shade:.2f}" title="{title}">{text}</span>'


def _numbers(record: RolloutRecord, position: int) -> str:
    """Lines of numbers of a token, those which it has."""
    logs = {"p": record.logps, "s": record.expert_logps}
    numbers = {"H": record.entropies, "w": record.weights, **logs, "rho": record.rho}
    lines = [f"token {position}, id {record.token_ids[position]}"]
    for name, values in numbers.items():
        if (value := values[position]) is not None:
            shown = math.exp(value) if name in logs else value
            lines.append(f"{name} = {shown:.4g}{' nats' if name == 'H' else ''}")
    kind = mark(record, position)
    return "\n".join([*lines, LEGEND[kind]] if kind else lines)


def _shown(token: str, token_id: int, kind: str | None) -> str:
    """Text of a token. A marked one must show: without visible text it is given some."""
    text = visible(token)
    if kind is None:
        return text
    if not text:
        return f"⟨{token_id}⟩"
    return text.replace("\n", "↵\n").replace("\t", "⇥\t") if not text.strip() else text


def _wrapped(text: Text, console: Console, width: int, ends: tuple[int, int] | None = None) -> list[Text]:
    """Lines of a text; of a long one so many of its first and last (`ends`)."""
    lines = list(text.wrap(console, width, overflow="fold"))
    if ends is None or len(lines) <= sum(ends) + 1:
        return lines
    left_out = Text(f"... {len(lines) - sum(ends)} more lines ...", style="italic")
    return [*lines[: ends[0]], left_out, *lines[-ends[1] :]]


def _marked(text: str, kind: str | None, plain: bool) -> Text:
    if kind is None:
        return Text(text)
    if not plain:
        return Text(text, style=STYLES[kind])
    # Brackets stand inside leading and trailing spaces, where there is anything else
    core = text.strip() or text
    before, _, after = text.partition(core)
    return Text(f"{before}{BRACKETS[kind][0]}{core}{BRACKETS[kind][1]}{after}")


def _visible_character(character: str) -> str:
    if character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    return "␡" if character == "\x7f" else f"\\u{ord(character):04x}"


def _reward(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.3g}"


def _share(count: int, total: int) -> str:
    return f" ({count / total:.1%})" if total else ""
