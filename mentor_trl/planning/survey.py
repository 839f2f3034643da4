"""From what somebody wants to a plan: models and data are looked at, settings chosen, everything checked."""

from dataclasses import dataclass
from typing import Any

from ..data.cells import column_paths, find_column
from ..data.loading import DataError, load_dataset_dict, select_split
from ..data.rows import build_prompt_dataset
from .checks import (
    OWN_REWARD,
    Check,
    check_lengths,
    check_memory,
    check_pair,
    check_solutions,
    own_stops,
    prompt_length,
)
from .choices import check_packages, completion_length, first_load, fit, remedies, sparing
from .hardware import Hardware
from .models import read_model
from .recipe_text import Plan
from .servers import check_expert_server


PROMPTS = ("prompt", "question", "problem", "instruction")
SOLUTIONS = ("solution", "answer", "ground_truth")


@dataclass(frozen=True)
class Wishes:
    """What somebody wants; the fields are the options of `mentor-trl init`."""

    policy: str
    expert: str | None
    expert_base_url: str | None
    method: str
    trust_remote_code: bool
    dataset_name: str
    dataset_config: str | None
    dataset_train_split: str
    dataset_prompt_column: str | None
    dataset_solution_column: str | None
    system_prompt: str | None
    reward_funcs: list[str] | None
    max_completion_length: int | None
    output_dir: str


def survey(wishes: Wishes, hardware: Hardware) -> tuple[Plan, list[Check]]:
    """
    The plan, and what was found on the way.

    Raises:
        [`~mentor_trl.errors.SetupError`]: if a model or the data cannot be read.
    """
    policy = read_model(wishes.policy, "policy", wishes.trust_remote_code)
    expert = read_model(wishes.expert, "expert", wishes.trust_remote_code) if wishes.expert else None
    checks = [Check("policy", policy.described)]
    if expert is not None:
        checks += [Check("expert", expert.described), *check_pair(policy, expert, extend=True)]
    if wishes.expert_base_url is not None:
        checks += check_expert_server(wishes.expert_base_url)
    options, dataset = read_data(wishes, bool(policy.tokenizer.chat_template))
    columns = f"{options['dataset_prompt_column']} and {options.get('dataset_solution_column', 'no solutions')}"
    checks.append(Check("data", f"{len(dataset):,} prompts ({columns})"))
    solutions = dataset["solution"] if "solution" in dataset.column_names else []
    checks.append(check_solutions(solutions, options["reward_funcs"]))
    prompt = prompt_length(policy, dataset)
    beside = [model for model in (policy, expert) if model is not None]
    completion = completion_length(wishes.max_completion_length, prompt, beside, hardware)
    checks.append(check_lengths(policy, expert, prompt, completion))
    local = None if wishes.expert_base_url else expert
    load, limit = fit(first_load(policy, local, prompt, completion, hardware), hardware)
    memory = check_memory(load, limit, "each GPU" if hardware.gpus else "the CPU", remedies(load, hardware))
    checks += [memory, Check("chosen", ", ".join(sparing(load))), *check_packages(load)]
    plan = Plan(
        wishes.method,
        load,
        hardware,
        len(dataset),
        wishes.expert,
        wishes.expert_base_url,
        expert is not None and own_stops(policy, expert),
        options,
        wishes.output_dir,
        wishes.trust_remote_code,
    )
    return plan, checks


def read_data(wishes: Wishes, has_chat_template: bool) -> tuple[dict[str, Any], Any]:
    """The options of the data block, and the rows that the trainer would get."""
    where = f"{wishes.dataset_name} (split '{wishes.dataset_train_split}')"
    splits = load_dataset_dict(wishes.dataset_name, wishes.dataset_config)
    rows = select_split(splits, wishes.dataset_train_split, "dataset_train_split")
    if len(rows) == 0:
        raise DataError(f"There are no rows in {where}; check the file, or choose another split")
    columns = column_paths(rows)
    prompt = wishes.dataset_prompt_column or find_column(columns, PROMPTS, "dataset_prompt_column", where)
    solution = wishes.dataset_solution_column or next((name for name in SOLUTIONS if name in columns), None)
    if solution is None and not wishes.reward_funcs:
        raise DataError(f"There is no column of solutions in {where}, only {columns}. {OWN_REWARD}")
    system = None if str(wishes.system_prompt).lower() in ("none", "") else wishes.system_prompt
    usual = ["accuracy_reward", "format_reward"] if system == "mentor" else ["accuracy_reward"]
    rewards = wishes.reward_funcs or usual
    dataset = build_prompt_dataset(
        rows,
        prompt_column=prompt,
        solution_column=solution,
        system_prompt=system,
        conversational=has_chat_template,
        require_solution="accuracy_reward" in rewards,
        name=where,
    )
    options = {
        "dataset_config": wishes.dataset_config,
        "dataset_name": wishes.dataset_name,
        "dataset_prompt_column": prompt,
        "dataset_solution_column": solution,
        "dataset_train_split": wishes.dataset_train_split,
        "reward_funcs": rewards,
        "system_prompt": system,
    }
    return {name: value for name, value in options.items() if value is not None}, dataset
