"""
Completion of commands, options and values in a shell: `mentor-trl completion SHELL` prints a script.

```bash
mentor-trl completion bash > ~/.local/share/bash-completion/completions/mentor-trl
mentor-trl completion zsh > ~/.mentor-trl.zsh      # and `source ~/.mentor-trl.zsh` in ~/.zshrc
```

The script holds the names: asking the command at each key would take a second.
"""

import argparse
import importlib

from mentor_trl.cli.main import COMMANDS


SHELLS = ("bash", "zsh")
BASH = """\
# Made by `mentor-trl completion {shell}`; make it again after an update.
_mentor_trl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=""
    local path=${{COMP_WORDS[1]}}
    case $path in {nested}) path="$path ${{COMP_WORDS[2]}}" ;; esac
    if ((COMP_CWORD == 1)); then
        words="{commands}"
    else
        case "$path $before" in
{values}
            *\\ --*) ;;
            *) case $path in
{options}
            esac ;;
        esac
    fi
    if ((COMP_CWORD == 2)); then
        case ${{COMP_WORDS[1]}} in
{seconds}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _mentor_trl mentor-trl
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands and subcommands that can be built here, by their words."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, (_, module, _) in COMMANDS.items():
        try:
            room = importlib.import_module(f"mentor_trl.cli.{'train' if name == 'train' else module}")
            if name == "data":
                found |= {f"data {kind}": room.make_parser(kind) for kind in room.COMMANDS}
            elif name == "eval":
                found[name] = importlib.import_module("mentor_trl.cli.eval").make_parser()
            elif name == "train":
                found[name] = room.make_parser(light=True)
            elif name not in ("health", "completion"):
                found[name] = room.make_parser()
        except ImportError:  # of an extra that is not installed: its options are not completed
            continue
    nested = [name for name, parser in found.items() if _subparsers(parser)]
    return found | {f"{name} {kind}": one for name in nested for kind, one in _subparsers(found[name]).items()}


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def script(shell: str) -> str:
    """The script of a shell, `"bash"` or `"zsh"`."""
    found = parsers()
    seconds: dict[str, list[str]] = {"completion": list(SHELLS)}
    for path in found:
        first, _, second = path.partition(" ")
        if second:
            seconds.setdefault(first, []).append(second)
    options, values = [], []
    for path, parser in found.items():
        names = [action.option_strings[0] for action in parser._actions if action.option_strings]
        names += ["--config"] if hasattr(parser, "parse_args_and_config") else []
        names += [name for name in getattr(parser, "_launch_options", ()) if "-" not in name[2:]]
        options.append(f'                "{path}") words="{" ".join(names)}" ;;')
        for action in parser._actions:
            bools = getattr(action.type, "__name__", "") == "string_to_bool"
            choices = ["true", "false"] if bools else list(action.choices or ()) if action.option_strings else []
            for name in action.option_strings[:1] if choices else ():
                values.append(f'            "{path} {name}") words="{" ".join(map(str, choices))}" ;;')
    text = BASH.format(
        shell=shell,
        commands=" ".join(COMMANDS),
        nested="|".join(name for name in seconds if name != "completion"),
        seconds="\n".join(f'            {name}) words="{" ".join(kinds)}" ;;' for name, kinds in seconds.items()),
        options="\n".join(options),
        values="\n".join(values),
    )
    return ZSH + text if shell == "zsh" else text


def run(args: list[str]) -> int:
    """Print the script of a shell."""
    parser = argparse.ArgumentParser(
        prog="mentor-trl completion",
        description="Print a script with which a shell completes commands, options and their values.",
        epilog="bash: write it to ~/.local/share/bash-completion/completions/mentor-trl; zsh: to a file that "
        "~/.zshrc sources behind `compinit`.",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    print(script(parser.parse_args(args).shell), end="")
    return 0
