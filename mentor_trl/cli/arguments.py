"""Arguments of `mentor-trl train` about data and rewards."""

from dataclasses import dataclass

from trl import ScriptArguments

from mentor_trl.config_fields import option


@dataclass
class MentorScriptArguments(ScriptArguments):
    """Arguments of `mentor-trl train` about data and rewards; each field's help says what it does."""

    reward_funcs: list[str] | None = option(
        None,
        "Reward functions to use. Supported values are: `accuracy_reward`, `format_reward`, TRL's "
        "`reasoning_accuracy_reward`, `think_format_reward` and `get_soft_overlong_punishment`, or any dotted "
        "import path (e.g., `my_lib.rewards.custom_reward`).",
    )
    reward_model_name_or_path: str | None = option(
        None, "Reward model id on the Hub, or path to a folder saved with `save_pretrained`."
    )
    dataset_prompt_column: str | None = option(
        None, "Column that holds the prompt: text, or a list of messages. If not set, the column `prompt`."
    )
    dataset_solution_column: str | None = option(
        None, "Column that holds the reference solution. If not set, the column `solution`."
    )
    dataset_solution_delimiter: str | None = option(
        None,
        "If set, the solution is what follows the last occurrence of this text (`####` for GSM8K), without the commas "
        "that group thousands.",
    )
    system_prompt: str | None = option(
        None,
        "System prompt of every prompt, instead of a system message that a row brings itself. `mentor` is that of the "
        "MENTOR paper.",
    )
    conversational: bool | None = option(
        None,
        "Whether text prompts become messages (True) or stay text (False). If not set, they become messages when the "
        "tokenizer has a chat template.",
    )
    hint_fraction: float | None = option(
        None,
        "If set, this share of the characters of a row's expert trajectory (QuestA: 0.5) is appended to its prompt as "
        "a hint, in the training rows only. Rows without a trajectory keep the plain prompt.",
    )
    dataset_trajectory_column: str = option(
        "trajectory", "Column that holds the expert trajectory that hints are taken from."
    )
    max_train_samples: int | None = option(None, "Number of training rows to keep, from the first one.")
    dry_run: bool = option(
        False,
        "Whether to check everything and make one step on a tiny batch instead of training. Nothing is written to "
        "`output_dir`.",
    )
    max_eval_samples: int | None = option(None, "Number of evaluation rows to keep, from the first one.")
