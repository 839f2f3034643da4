"""TRL's argument parser; here unknown keys are errors that name the nearest key, and the help has sections."""

import argparse
import difflib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from trl import TrlParser

from mentor_trl.errors import EngineError, SetupError


# Read by TRL's own CLI from the same place; it becomes `accelerate launch --config_file`.
ACCELERATE_CONFIG = "--accelerate_config"
# Columns of the help on a wide terminal, and characters that choices may take beside an option
MAX_WIDTH, MAX_CHOICES = 110, 30


class _HelpFormatter(argparse.HelpFormatter):
    """One spelling an option, with its type; its default behind the help. Lines are short enough to read."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns - 2, MAX_WIDTH))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {kind_of(action)}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        # References of docstrings: the last name of `[`~a.b.C.d`]` says it
        text = re.sub(r"\[`~(?:[a-z_]\w*\.)*([\w.]+)`\]", r"`\1`", action.help or "")
        text = re.sub(r"\[`([\w.]+)`\]", r"`\1`", text)
        choices = ", ".join(map(str, action.choices or ()))
        if choices and kind_of(action) == "CHOICE":
            text += f" One of {choices}."
        default = "" if action.default is argparse.SUPPRESS else shown_default(action.default)
        return text + (f" (default: {default})" if default else "")


def kind_of(action: argparse.Action) -> str:
    """
    What an option takes, as its help shows it.

    >>> parser = argparse.ArgumentParser()
    >>> kind_of(parser.add_argument("--steps", type=int)), kind_of(parser.add_argument("--names", nargs="+"))
    ('INT', 'TEXT ...')
    """
    if action.nargs == 0:
        return ""
    if action.choices:
        few = "{" + ",".join(map(str, action.choices)) + "}"
        return few if len(few) <= MAX_CHOICES else "CHOICE"
    name = getattr(action.type, "__name__", "")
    kind = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}.get(name, "TEXT")
    return f"{kind} ..." if action.nargs == "+" else kind


def shown_default(value: Any) -> str:
    """
    A default as a config file writes it; nothing where there is none.

    >>> shown_default(True), shown_default(1e-06), shown_default(None), shown_default([0.9, 0.1])
    ('true', '1e-06', '', '0.9 0.1')
    """
    value = getattr(value, "value", value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown_default, value))
    return "" if value is None else str(value).replace("%", "%%")


class MentorArgumentParser(TrlParser):
    """
    Parser whose options are the fields of dataclasses. A section of the help shows the own fields of a class; other
    fields come last. Where `accelerate launch` may start the script (`launched`), its options are known too.
    """

    def __init__(
        self, dataclass_types: Iterable[type], sections: dict[str, type], launched: bool = True, **kwargs: Any
    ):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self._sections = {title: list(one.__annotations__) for title, one in sections.items()}
        self._launched = launched
        # Not of `field.type`, which the parser narrows
        hints = {name: str(hint) for one in dataclass_types for name, hint in get_type_hints(one).items()}
        self._mappings = {name for name, hint in hints.items() if "dict" in hint}

    def split_launch_args(self, args: list[str]) -> tuple[list[str], list[str]]:
        """
        Part the options of `accelerate launch` (also those of a config file) from those of the script.

        Also sets the environment variables of the config file, which the launched processes inherit.
        """
        args = _split_config_flag(args)
        self._check_mappings(args)
        config, rest = self._part_config(args)
        os.environ.update({key: str(value) for key, value in (config.pop("env", None) or {}).items()})
        config_launch_args = self.set_defaults_with_config(**config)
        _, cli_launch_args = self.parse_known_args(rest)
        self._check_launch_args(cli_launch_args)
        return config_launch_args + cli_launch_args, _without(args, cli_launch_args)

    def parse_args_and_config(self, args: Iterable[str] | None = None, fail_with_unknown_args: bool = False) -> tuple:
        """Parse the command line and its config file; what the dataclasses refuse is an error of one line."""
        args = _split_config_flag(list(sys.argv[1:] if args is None else args))
        self.split_launch_args(args)
        try:
            return super().parse_args_and_config(args, fail_with_unknown_args=fail_with_unknown_args)
        except (ValueError, ImportError, OSError) as error:
            self.error(str(error))

    def run(self, args: list[str] | None, main: Callable[..., None]) -> int:
        """Run `main` with the parsed options; a mistake of the user ends in one line on stderr and exit code 2."""
        try:
            main(*self.parse_args_and_config(args))
        except (SetupError, EngineError) as error:
            self.error(str(error))
        return 0

    def given_options(self, args: Iterable[str]) -> dict[str, Any]:
        """What a config file and the command line set; the latter wins. The file's `env` is left out."""
        config, rest = self._part_config(_split_config_flag(list(args)))
        actions = {action.dest: action for action in self._actions}
        config.pop("env", None)
        given = {key: self._typed(actions[key], value) if key in actions else value for key, value in config.items()}
        unset = argparse.Namespace(**dict.fromkeys(actions, argparse.SUPPRESS))
        parsed, _ = self.parse_known_args(rest, unset)
        return given | {name: value for name, value in vars(parsed).items() if value is not argparse.SUPPRESS}

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the values of a config file as defaults; returns the options meant for `accelerate launch`."""
        actions = {action.dest: action for action in self._actions}
        ours = {key: self._typed(actions[key], value) for key, value in config.items() if key in actions}
        launch_args = [self._launch_args_of(key, value) for key, value in config.items() if key not in actions]
        super().set_defaults_with_config(**ours)
        return sum(launch_args, [])

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} [--config FILE.yaml] [--any_field value ...]", [], [], prefix="usage: ")
        formatter.add_text(f"{self.description} Options without a default are not set.")
        actions = {action.dest: action for action in reversed(self._actions)}
        shown = {name for names in self._sections.values() for name in names}
        rest = [name for name in reversed(actions) if name not in shown and name != "help"]
        for title, names in {**self._sections, "all other training options": rest}.items():
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> None:
        super().error(" ".join(message.split()))

    def format_usage(self) -> str:
        return f"usage: {self.prog} [--config FILE.yaml] [--any_field value ...]   (--help lists the fields)\n"

    def _check_mappings(self, args: list[str]) -> None:
        """Refuse text for a mapping that is neither a JSON object nor the name of a file."""
        for name, value in self.given_options(args).items():
            if name not in self._mappings or not isinstance(value, str) or Path(value).is_file():
                continue
            try:
                valid = isinstance(json.loads(value), dict)
            except ValueError:
                valid = value.lower() in ("", "none", "null")
            if not valid:
                self.error(f"option '--{name}' is {value!r}, which is no JSON; write it as '{{\"key\": \"value\"}}'")

    def _part_config(self, args: list[str]) -> tuple[dict[str, Any], list[str]]:
        """What the config file holds, and the arguments without it."""
        if "--config" not in args:
            return {}, args
        position = args.index("--config")
        path = next(iter(args[position + 1 :]), None)
        return self._read_config(path), args[:position] + args[position + 2 :]

    def _read_config(self, path: str | None) -> dict[str, Any]:
        import yaml

        if path is None:
            self.error("--config needs the path of a YAML file")
        if not Path(path).is_file():
            self.error(f"config file {path} does not exist (working directory: {Path.cwd()})")
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            self.error(f"config file {path} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(config, dict) or not isinstance(config.get("env") or {}, dict):
            self.error(f"config file {path} must hold 'key: value' lines, and `env`, where it is set, too")
        return config

    @cached_property
    def _launch_options(self) -> dict[str, argparse.Action | None]:
        if not self._launched:
            return {}
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser()._option_string_actions
        return {ACCELERATE_CONFIG: None} | {name: options[name] for name in options if name.startswith("--")}

    def _typed(self, action: argparse.Action, value: Any) -> Any:
        # argparse checks and converts text, so only what YAML has typed itself needs care.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if action.choices and value is not None and value not in action.choices:
            self.error(f"key '{action.dest}' of the config file is {value!r}; choose one of {list(action.choices)}")
        if action.nargs == "+":
            return [value] if is_number or isinstance(value, str) else value
        if is_number or action.type in (int, float) and isinstance(value, (bool, list, dict)):
            try:
                return self._get_value(action, str(value))
            except argparse.ArgumentError as error:
                self.error(f"key '{action.dest}' of the config file: {error.message}")
        return value

    def _launch_args_of(self, key: str, value: Any) -> list[str]:
        option = f"--{key}"
        if option not in self._launch_options:
            self._fail_unknown(key, f"key '{key}' of the config file")
        action = self._launch_options[option]
        if action is not None and action.nargs == 0:
            return [option] if value else []
        return [] if value is None else [option, str(value)]

    def _check_launch_args(self, launch_args: list[str]) -> None:
        remaining = iter(launch_args)
        for arg in remaining:
            option, has_value, _ = arg.partition("=")
            if not arg.startswith("-"):
                self.error(f"unexpected argument '{arg}'; options are given as --name value")
            if option not in self._launch_options:
                self._fail_unknown(option.lstrip("-"), f"option '{option}'")
            action = self._launch_options[option]
            takes_value = action is None or action.nargs != 0
            if takes_value and not has_value and next(remaining, None) is None:
                self.error(f"option '{option}' needs a value")

    def _fail_unknown(self, name: str, where: str) -> None:
        known = {action.dest for action in self._actions} | {"accelerate_config"}
        known |= {option.lstrip("-") for option in self._launch_options if "-" not in option[2:]}
        near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=3)
        hint = f"did you mean {' or '.join(repr(match) for match in near)}?" if near else "--help lists all of them"
        self.error(f"unknown {where}: {hint}")


def _split_config_flag(args: list[str]) -> list[str]:
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]


def _without(args: list[str], launch_args: list[str]) -> list[str]:
    # The launch options are a subsequence of the command line, in order.
    kept, left = [], list(launch_args)
    for arg in args:
        if left and arg == left[0]:
            left.pop(0)
        else:
            kept.append(arg)
    return kept
