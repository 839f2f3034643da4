"""Fields of a configuration: one source for its defaults, its docstring and the command line."""

import inspect
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, field, fields
from typing import Any


def option(default: Any, help: str, choices: Collection[str] | None = None) -> Any:
    """A field with its help, which the command line and the docstring show."""
    return field(default=default, metadata={"help": help} | ({"choices": list(choices)} if choices else {}))


def documented(cls: type) -> type:
    """Add the fields of a class, with their types, defaults and helps, to its docstring in TRL's form."""
    lines = ["", "", "Parameters:"]
    for name, kind in cls.__annotations__.items():
        described = cls.__dataclass_fields__[name]
        default = "" if described.default is None else f", defaults to `{described.default!r}`"
        lines.append(f"    {name} (`{getattr(kind, '__name__', kind)}`, *optional*{default}):")
        lines += textwrap.wrap(described.metadata["help"], 107, initial_indent=" " * 8, subsequent_indent=" " * 8)
    cls.__doc__ = inspect.cleandoc(cls.__doc__) + "\n".join(lines) + "\n"
    return cls


def given_fields(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; those that have none are left out."""
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(config)
    }
    return {
        name: getattr(config, name)
        for name, default in defaults.items()
        if default is not MISSING and getattr(config, name) != default
    }
