import re
from pathlib import Path

import pytest
import yaml

from mentor_trl.scripts.train import make_parser, resolve_reward_funcs


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
# Configurations for accelerate itself are read by accelerate.
TRAINING_RECIPES = [path for path in RECIPES if "accelerate_configs" not in path.parts]
BLOCKS = ["# Model arguments", "# Data arguments", "# Trainer arguments"]


def each(recipes: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "recipe", recipes, ids=[str(path.relative_to(ROOT / "recipes")) for path in recipes]
    )


def read(recipe: Path) -> dict:
    return yaml.safe_load(recipe.read_text())


@each(TRAINING_RECIPES)
def test_values_parse(recipe):
    _, script_args = make_parser().split_launch_args(["--config", str(recipe)])
    # Every machine can read a recipe, also one without a GPU that could train it.
    script_args += ["--use_cpu", "--bf16", "false"]
    args, training_args, model_args, _ = make_parser().parse_args_and_config(script_args, fail_with_unknown_args=False)
    config = read(recipe)
    assert training_args.num_mixed_generations == config["num_mixed_generations"]
    assert training_args.learning_rate == float(config["learning_rate"])
    assert model_args.model_name_or_path == config["model_name_or_path"]
    assert len(resolve_reward_funcs(args.reward_funcs)) == len(training_args.reward_weights)
    assert bool(training_args.expert_model_name_or_path) == (training_args.num_mixed_generations > 0)


@each(TRAINING_RECIPES)
def test_header_holds_the_launch_command(recipe):
    header = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"mentor-trl train --config {recipe.relative_to(ROOT)}" in header


@each(TRAINING_RECIPES)
def test_paths_in_the_header_exist(recipe):
    header = recipe.read_text().split("\n\n")[0]
    for path in re.findall(r"(?:examples|recipes)/[\w./-]+\.(?:py|yaml)", header):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\.\./[\w./-]+\.yaml", header):
        assert (recipe.parent / path).is_file(), path


@each(TRAINING_RECIPES)
def test_three_blocks_with_sorted_keys(recipe):
    text = recipe.read_text()
    positions = [text.index(block + "\n") for block in BLOCKS]
    assert positions == sorted(positions)
    for start, end in zip(positions, [*positions[1:], len(text)]):
        keys = list(yaml.safe_load(text[start:end]))
        assert keys == sorted(keys)


@each([path for path in TRAINING_RECIPES if path.parent.name == "grpo"])
def test_baseline_differs_only_in_the_expert(recipe):
    baseline, mentor = read(recipe), read(recipe.parent.parent / "mentor" / recipe.name)
    assert baseline["num_mixed_generations"] == 0
    ours = ("expert_", "alpha", "correction", "entropy_", "num_mixed", "output_dir")
    rest = {key: value for key, value in mentor.items() if not key.startswith(ours)}
    assert rest == {key: value for key, value in baseline.items() if not key.startswith(ours)}
