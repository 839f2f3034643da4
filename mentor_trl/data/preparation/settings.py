"""The options of `mentor-trl data`; each field's help says what it does."""

from dataclasses import dataclass
from typing import Any, Literal

from ...config_fields import option
from ..hints import HintPart


@dataclass
class PromptArguments:
    """Arguments of `mentor-trl data math`, `gsm8k`, `openr1` and `custom`, which differ in their defaults."""

    dataset_name: str | None = option(None, "Hub id, data file, or folder of the problems.")
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_split: str = option("train", "Split of the problems.")
    prompt_column: str | None = option(None, "Column of the problem (text or messages). If not set, a usual name.")
    solution_column: str | None = option(
        None, "Column of the answer, or of a worked solution with \\boxed{}. If not set, a usual name."
    )
    solution_delimiter: str | None = option(
        None, "If set, the answer is what follows the last occurrence of this text (`####` for GSM8K)."
    )
    trajectory_column: str | None = option(None, "Column of an expert's whole response, which becomes `trajectory`.")
    generations: bool = option(
        False,
        "Whether the rows have the columns `generations` and `correctness_math_verify` of OpenR1-Math, of which the "
        "first correct, complete and short enough one becomes `trajectory`.",
    )
    all_generations: bool = option(False, "Whether to keep all such generations, in the column `trajectories`.")
    max_response_tokens: int = option(4096, "Tokens that a generation may have.")
    level_column: str | None = option(None, 'Column of the level: a number, or text such as "Level 5".')
    levels: list[int] | None = option(None, "Levels to keep. If not set, all rows.")
    keep_columns: list[str] | None = option(None, "Further columns to keep as they are.")
    test_sets: list[str] | None = option(
        None, "Test sets whose problems are left out: names, NAME=PATH, or paths and Hub ids. `none` for none."
    )
    eval_set: str | None = option(
        None, "Test set that becomes the split `test`; training rows never overlap with it. `none` for none."
    )
    keep_duplicates: bool = option(False, "Whether to keep problems that occurred before, which are counted anyway.")
    verifiable_only: bool = option(
        False, "Whether to drop rows whose answer math-verify cannot parse, which `accuracy_reward` would skip."
    )
    tokenizer: str | None = option(None, "Hub id or folder of the tokenizer that measures lengths.")
    max_prompt_tokens: int | None = option(None, "Tokens of a prompt, chat template included. Needs `tokenizer`.")
    max_samples: int | None = option(None, "Number of rows to keep in the end, from the first one.")
    system_prompt: str | None = option("mentor", "System prompt, `mentor` for the MENTOR paper's, `none` for none.")
    conversational: bool = option(True, "Whether prompts are messages (true) or text (false).")
    num_proc: int | None = option(None, "Number of processes that measure generations.")


@dataclass
class TrajectoryArguments:
    """Arguments of `mentor-trl data trajectories`."""

    dataset_name: str | None = option(None, "Prompt dataset: Hub id, file, or folder that `mentor-trl data` made.")
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_split: str = option("train", "Split that gets trajectories. The other splits stay as they are.")
    expert: str | None = option(None, "Hub id or folder of the expert, or the name under which a server serves it.")
    expert_revision: str | None = option(None, "Revision of the expert.")
    tokenizer: str | None = option(
        None,
        "Hub id or folder of the tokenizer whose chat template renders the prompts: the policy's, which must have the "
        "expert's tokens. If not set, the expert's.",
    )
    trust_remote_code: bool = option(False, "Whether to run code that the expert's repository ships.")
    keep_correct: bool = option(False, "Whether only responses that `accuracy_reward` finds correct are trajectories.")
    all_trajectories: bool = option(False, "Whether to keep every response that may, in the column `trajectories`.")
    num: int = option(1, "Responses a prompt; the first that may becomes its trajectory.")
    temperature: float = option(0.6, "Temperature; 0 for the likeliest token.")
    top_p: float = option(0.95, "Nucleus that is sampled from.")
    max_new_tokens: int = option(4096, "Tokens of a response. A response that reaches them is no trajectory.")
    seed: int = option(42, "Seed.")
    max_samples: int | None = option(None, "Number of rows to keep, from the first one.")
    engine: Literal["auto", "transformers", "vllm", "server"] = option(
        "auto", "`auto` for a server where `server_url` is set, vLLM where it is installed, and else transformers."
    )
    server_url: str | None = option(None, "Address of a stock vLLM server of the expert.")
    batch_size: int | None = option(
        None,
        "Prompts a batch; the responses are saved after each. If not set, 8 (transformers), 512 (vllm), 64 (server).",
    )
    dtype: str = option("auto", "Data type of the expert's weights.")
    tensor_parallel_size: int | None = option(None, "Devices that vLLM spreads the expert over.")
    gpu_memory_utilization: float | None = option(None, "Share of the memory that vLLM may use.")
    max_model_len: int | None = option(None, "Longest sequence that vLLM makes room for.")


@dataclass
class HintArguments:
    """Arguments of `mentor-trl data hints`."""

    dataset_name: str | None = option(None, "Dataset with `prompt` and `trajectory`: Hub id, file, or folder.")
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_split: str = option("train", "Split whose prompts get hints. The other splits stay as they are.")
    fraction: float = option(0.5, "Share of the trajectory to show.")
    part: HintPart = option(
        "trajectory", "What the share is of: the whole response (trajectory), or what follows </think> (solution)."
    )
    tokenizer: str | None = option(None, "Hub id or folder of the tokenizer that counts. If not set, by characters.")
    drop_without_trajectory: bool = option(False, "Whether to drop rows without a hint; else they stay plain.")


@dataclass
class OutputArguments:
    """Arguments about where a dataset goes."""

    output_dir: str | None = option(None, "Folder to make.")
    output_format: Literal["parquet", "arrow"] = option(
        "parquet", "`parquet` as in a Hub repository, for `load_dataset`; `arrow` for `load_from_disk`."
    )
    push_to_hub: str | None = option(None, "Id of the Hub dataset to upload to.")
    private: bool = option(False, "Whether a Hub dataset that is made anew is private.")


MATH_TEST_SETS = ["math500", "aime24", "aime25", "amc23", "amc", "minerva", "olympiadbench"]

PRESETS: dict[str, dict[str, Any]] = {
    # The 12,000 problems of MATH outside MATH-500, with the level of each.
    "math": {
        "dataset_name": "nlile/hendrycks-MATH-benchmark",
        "prompt_column": "problem",
        "level_column": "level",
        "levels": [3, 4, 5],
        "test_sets": MATH_TEST_SETS,
        "eval_set": "math500",
    },
    "openr1": {
        "dataset_name": "open-r1/OpenR1-Math-220k",
        "dataset_config": "default",
        "prompt_column": "problem",
        "solution_column": "answer",
        "generations": True,
        "tokenizer": "open-r1/OpenR1-Qwen-7B",
        "test_sets": MATH_TEST_SETS,
        "eval_set": "math500",
    },
    "gsm8k": {
        "dataset_name": "openai/gsm8k",
        "dataset_config": "main",
        "prompt_column": "question",
        "solution_column": "answer",
        "solution_delimiter": "####",
        "test_sets": ["gsm8k"],
        "eval_set": "gsm8k",
    },
    "custom": {},
}
"""Defaults of each command, by its name."""
