"""
Write docs/reference/config.md and docs/reference/cli.md from the code: `python docs/tools/reference.py`, or
`make reference`. A test compares them with it.
"""

import argparse
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mentor_trl import MentorGRPOConfig
from mentor_trl.cli.main import COMMANDS, main


FOLDER = Path(__file__).parent.parent / "reference"
MADE = "Written by `make reference`."
TRAIN = (
    "All fields of the [configuration](config.md), of TRL's `GRPOConfig`, `ModelConfig`, `ScriptArguments` and "
    "`DatasetMixtureConfig` are flags. These are about data and rewards:"
)


def config_page() -> str:
    """Every field of the configuration that GRPO does not have, under the comments of its source."""
    lines = [
        "# Configuration",
        "",
        "The fields that `MentorGRPOConfig` adds to TRL's `GRPOConfig`: arguments in Python, keys of a config file,",
        f"flags of `mentor-trl train`. {MADE}",
    ]
    kinds = typing.get_type_hints(MentorGRPOConfig)
    for line in inspect.getsource(MentorGRPOConfig).splitlines():
        if heading := re.match(r"    # Parameters that control (.*)$", line):
            title = heading[1].partition(":")[0]
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        elif (name := re.match(r"    (\w+): .*option\(", line)) and name[1] in MentorGRPOConfig.__annotations__:
            lines.append(_field(name[1], kinds[name[1]]))
    return "\n".join(lines) + "\n"


def _field(name: str, kind: typing.Any) -> str:
    described = MentorGRPOConfig.__dataclass_fields__[name]
    text = re.sub(r"\[`~?([^`]*)`\]", r"`\1`", described.metadata["help"])
    choices = described.metadata.get("choices")
    one_of = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    written = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind).replace("typing.", "")
    return f'- <a id="{name}"></a>**`{name}`** (`{written}`, default `{described.default!r}`): {text}{one_of}'


class _Found(Exception):
    """Carries the parser that was asked for its help."""


def _parser_of(words: list[str]) -> argparse.ArgumentParser:
    def found(action, parser, *rest):
        raise _Found(parser)

    with mock.patch.object(argparse._HelpAction, "__call__", found):
        try:
            main([*words, "--help"])
        except _Found as answer:
            return answer.args[0]
    raise AssertionError(f"{' '.join(words)} has no --help")


def _parsers(words: list[str]) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    parser = _parser_of(words)
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                yield from _parsers([*words, name])


def cli_page() -> str:
    """Every command with its own options."""
    lines = [
        "# Command line",
        "",
        f"`mentor-trl COMMAND --help` shows the same in the terminal. {MADE}",
        "",
        "| command | |",
        "| --- | --- |",
        *(f"| [`{name}`](#mentor-trl-{name}) | {text} |" for name, (text, *_) in COMMANDS.items()),
    ]
    listed: dict[tuple[str, ...], tuple[str, list[str]]] = {}  # names of options: the command that had them first
    for command in COMMANDS:
        for words, parser in _parsers([command]):
            name = f"mentor-trl {' '.join(words)}"
            lines += ["", f"{'#' * (len(words) + 1)} {name}"]
            paragraphs = [_plain(part) for part in (parser.description, parser.epilog) if part]
            actions = _own_actions(words, parser)
            options = [_option(action) for action in actions]
            key = tuple(action.dest for action in actions)
            if words == ["train"]:
                paragraphs.append(TRAIN)
            elif actions and key in listed:
                first, others = listed[key]
                options = [option for option in options if option not in others]
                paragraphs.append(f"The options of [`{first}`](#{first.replace(' ', '-')}), of which these differ:")
            listed.setdefault(key, (name, options))
            for paragraph in paragraphs:
                lines += ["", *textwrap.wrap(paragraph, 119, break_long_words=False, break_on_hyphens=False)]
            lines += ["", *options] if options else []
    return "\n".join(lines) + "\n"


def _own_actions(words: list[str], parser: argparse.ArgumentParser) -> list[argparse.Action]:
    # The fields of training are on the page of the configuration, or TRL's
    kept = parser._sections["data and rewards"] if words == ["train"] else None
    skipped = (argparse._HelpAction, argparse._SubParsersAction)
    by_name = {action.dest: action for action in reversed(parser._actions) if not isinstance(action, skipped)}
    return [by_name[name] for name in (kept or reversed(by_name))]


def _option(action: argparse.Action) -> str:
    name = ", ".join(f"`{one}`" for one in _spellings(action)) or f"`{action.metavar or action.dest}`"
    text, default = _plain(action.help or ""), action.default
    default = " ".join(map(str, default)) if isinstance(default, list) else default
    told = default is None or default is False or default in ("", argparse.SUPPRESS) or f"({default})" in text
    return f"- **{name}** ({_kind(action)}{'' if told else f', default `{default}`'}): {text}"


def _plain(text: str) -> str:
    """Text of a help as Markdown: percent signs as argparse shows them, and no HTML outside code."""
    parts = text.replace("%%", "%").split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _spellings(action: argparse.Action) -> list[str]:
    # The parser of dataclasses adds `--a-b` to `--a_b`
    return list({one.replace("-", "_"): one for one in reversed(action.option_strings)}.values())[::-1]


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "flag"
    if action.choices:
        kind = " or ".join(f"`{choice}`" for choice in action.choices)
    else:
        name = getattr(action.type, "__name__", "str")
        kind = f"`{'bool' if name == 'string_to_bool' else name}`"
    return f"{kind}, several" if action.nargs in ("+", "*") else kind


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for page, text in (("config.md", config_page()), ("cli.md", cli_page())):
        (FOLDER / page).write_text(text, encoding="utf-8")
