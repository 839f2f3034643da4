"""Arguments of `mentor-trl train` about data and rewards."""

from dataclasses import dataclass, field
from typing import Any

from trl import ScriptArguments


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MentorScriptArguments(ScriptArguments):
    """Arguments of `mentor-trl train` about data and rewards; each field's help says what it does."""

    reward_funcs: list[str] | None = _option(
        None,
        "Reward functions to use. Supported values are: `accuracy_reward`, `format_reward`, TRL's "
        "`reasoning_accuracy_reward`, `think_format_reward` and `get_soft_overlong_punishment`, or any dotted "
        "import path (e.g., `my_lib.rewards.custom_reward`).",
    )
    reward_model_name_or_path: str | None = _option(
        None, "Reward model id on the Hub, or path to a folder saved with `save_pretrained`."
    )
    dataset_prompt_column: str | None = _option(
        None, "Column that holds the prompt: text, or a list of messages. If not set, the column `prompt`."
    )
    dataset_solution_column: str | None = _option(
        None, "Column that holds the reference solution. If not set, the column `solution`."
    )
    dataset_solution_delimiter: str | None = _option(
        None,
        "If set, the solution is what follows the last occurrence of this text (`####` for GSM8K), with "
        "the commas that group thousands removed.",
    )
    system_prompt: str | None = _option(
        None,
        "System prompt put before every prompt, or the word `mentor` for the system prompt of the MENTOR "
        "paper. It takes the place of a system message that a row brings itself.",
    )
    conversational: bool | None = _option(
        None,
        "Whether prompts given as text become messages (True) or stay text (False). If not set, they "
        "become messages when the tokenizer has a chat template.",
    )
    hint_fraction: float | None = _option(
        None,
        "If set, the first so much of a row's expert trajectory (a share of its characters; QuestA: 0.5) "
        "is appended to its prompt as a hint, in the training rows only. Rows without a trajectory keep the plain "
        "prompt.",
    )
    dataset_trajectory_column: str = _option(
        "trajectory", "Column that holds the expert trajectory that hints are taken from."
    )
    max_train_samples: int | None = _option(None, "Number of training rows to keep, from the first one.")
    max_eval_samples: int | None = _option(None, "Number of evaluation rows to keep, from the first one.")
