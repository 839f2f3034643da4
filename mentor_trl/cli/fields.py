"""
The options of training, read from the sources of their dataclasses: importing these takes seconds (transformers, PEFT
and torch), which `--help` and a misspelt option need not wait for.
"""

import ast
import builtins
import importlib.util
from dataclasses import field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal


# Each class with its package, its file there, and the class that it extends
SOURCES = {
    "TrainingArguments": ("transformers", "training_args.py", None),
    "_BaseConfig": ("trl", "trainer/base_config.py", "TrainingArguments"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py", "_BaseConfig"),
    "MentorGRPOConfig": ("mentor_trl", "config.py", "GRPOConfig"),
    "ModelConfig": ("trl", "trainer/model_config.py", None),
    "ScriptArguments": ("trl", "scripts/utils.py", None),
    "DatasetMixtureConfig": ("trl", "scripts/utils.py", None),
    "MentorScriptArguments": ("mentor_trl", "cli/arguments.py", "ScriptArguments"),
}


@cache
def light_class(name: str) -> type:
    """A dataclass with the fields of one of [`SOURCES`] (name, type, default and help) and nothing else."""
    package, path, base = SOURCES[name]
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    tree = ast.parse(Path(folder, path).read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.Tuple))
    }
    constants["default_optim"] = "adamw_torch_fused"  # with every torch that we allow
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [_field(node, constants) for node in definition.body if isinstance(node, ast.AnnAssign)]
    return make_dataclass(name, fields, bases=(light_class(base),) if base else ())


def _field(node: ast.AnnAssign, constants: dict[str, Any]) -> tuple[str, Any, Any]:
    # Types of other modules, all of which are written as text on a command line, are text
    used = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)} - set(dir(builtins))
    kind = _evaluate(node.annotation, dict.fromkeys(used, str) | {"Any": Any, "Literal": Literal})
    if not isinstance(node.value, ast.Call):
        return node.target.id, kind, field(default=_evaluate(node.value, constants))
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    if node.value.args:  # `option(default, help)`
        default, text = (_evaluate(argument, constants) for argument in node.value.args)
        return node.target.id, kind, field(default=default, metadata={"help": text})
    texts = given.pop("metadata", ast.Dict([], []))
    metadata = {key.value: _evaluate(value, constants) for key, value in zip(texts.keys, texts.values)}
    given = {name: _evaluate(value, constants) for name, value in given.items()}
    return node.target.id, kind, field(**given, metadata={key: value for key, value in metadata.items() if value})


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression; `None` where it needs more than literals and constants of its module."""
    try:
        return eval(compile(ast.Expression(node), "<field>", "eval"), dict(names))
    except NameError:
        return None
