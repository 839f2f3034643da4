"""One rollout as text in which one sees where the expert spoke: for a terminal, and as a page of HTML."""

import html
import math
import unicodedata
from collections.abc import Sequence
from importlib import resources
from string import Template

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..training.rollout_log import RolloutRecord


AGREED, REPLACED, CHOSEN = "agreed", "replaced", "chosen"
# Readable without colour as well: one is underlined, the other set in reverse. The colours are told apart by the
# colour-blind, and differ in lightness.
STYLES = {AGREED: "bold underline #3aa5dd", REPLACED: "bold #000000 on #e69f00", CHOSEN: "bold #000000 on #8fd0a5"}
BRACKETS = {AGREED: ("‹", "›"), REPLACED: ("«", "»"), CHOSEN: ("‹", "›")}
LEGEND = {
    AGREED: "branch point: the expert chose, and agreed with the draft",
    REPLACED: "branch point: the expert replaced the draft",
    CHOSEN: "branch point: the expert chose, and there was no draft",
}


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
    facts = [f"step {record.step}", f"row {record.row}", f"source {record.source}", f"reward {_reward(record)}"]
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
        facts = [str(record.row), record.source, _reward(record), f"{record.advantage:+.3f}"]
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


def _reward(record: RolloutRecord) -> str:
    return "undefined" if record.reward is None else f"{record.reward:.3g}"


def _share(count: int, total: int) -> str:
    return f" ({count / total:.1%})" if total else ""
