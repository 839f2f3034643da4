"""The options of `mentor-trl data`; each field's help says what it does."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..hints import HintPart


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PromptArguments:
    """Arguments of `mentor-trl data math`, `gsm8k`, `openr1` and `custom`, which differ in their defaults."""

    dataset_name: str | None = _option(None, "Hub id, data file, or folder of the problems.")
    dataset_config: str | None = _option(None, "Configuration of a Hub dataset.")
    dataset_split: str = _option("train", "Split of the problems.")
    prompt_column: str | None = _option(
        None, "Column of the problem: text, or a list of messages. If not set, the first of the usual names."
    )
    solution_column: str | None = _option(
        None,
        "Column of the answer, or of a worked solution with \\boxed{}. If not set, the first of the usual names.",
    )
    solution_delimiter: str | None = _option(
        None, "If set, the answer is what follows the last occurrence of this text (`####` for GSM8K)."
    )
    trajectory_column: str | None = _option(None, "Column of an expert's whole response, which becomes `trajectory`.")
    generations: bool = _option(
        False,
        "Whether the rows have the columns `generations` and `correctness_math_verify` of OpenR1-Math, of which the "
        "first correct, complete and short enough one becomes `trajectory`.",
    )
    all_generations: bool = _option(False, "Whether to keep all such generations, in the column `trajectories`.")
    max_response_tokens: int = _option(4096, "Tokens that a generation may have.")
    level_column: str | None = _option(None, 'Column of the level: a number, or text such as "Level 5".')
    levels: list[int] | None = _option(None, "Levels to keep. If not set, all rows.")
    keep_columns: list[str] | None = _option(None, "Further columns to keep as they are.")
    test_sets: list[str] | None = _option(
        None, "Test sets whose problems are left out: names, NAME=PATH, or paths and Hub ids. `none` for none."
    )
    eval_set: str | None = _option(
        None,
        "Test set that becomes the split `test`; the training rows never overlap with it. `none` for none.",
    )
    keep_duplicates: bool = _option(
        False, "Whether to keep problems that occurred before. They are counted in any case."
    )
    verifiable_only: bool = _option(
        False, "Whether to drop rows whose answer math-verify cannot parse, which `accuracy_reward` would skip."
    )
    tokenizer: str | None = _option(None, "Hub id or folder of the tokenizer that measures lengths.")
    max_prompt_tokens: int | None = _option(
        None, "Tokens that a prompt may have, chat template included. Needs `tokenizer`."
    )
    max_samples: int | None = _option(None, "Number of rows to keep in the end, from the first one.")
    system_prompt: str | None = _option("mentor", "System prompt, `mentor` for the MENTOR paper's, `none` for none.")
    conversational: bool = _option(True, "Whether prompts are messages (true) or text (false).")
    num_proc: int | None = _option(None, "Number of processes that measure generations.")


@dataclass
class TrajectoryArguments:
    """Arguments of `mentor-trl data trajectories`."""

    dataset_name: str | None = _option(None, "Prompt dataset: Hub id, file, or folder that `mentor-trl data` made.")
    dataset_config: str | None = _option(None, "Configuration of a Hub dataset.")
    dataset_split: str = _option("train", "Split that gets trajectories. The other splits stay as they are.")
    expert: str | None = _option(
        None, "Hub id or folder of the expert; of a server, the name under which it serves the expert."
    )
    expert_revision: str | None = _option(None, "Revision of the expert.")
    tokenizer: str | None = _option(
        None,
        "Hub id or folder of the tokenizer whose chat template renders the prompts: the policy's, which must have the "
        "expert's tokens. If not set, the expert's.",
    )
    trust_remote_code: bool = _option(False, "Whether to run code that the expert's repository ships.")
    keep_correct: bool = _option(
        False, "Whether only responses that `accuracy_reward` grades as correct become trajectories."
    )
    all_trajectories: bool = _option(False, "Whether to keep every response that may, in the column `trajectories`.")
    num: int = _option(1, "Responses a prompt; the first that may becomes its trajectory.")
    temperature: float = _option(0.6, "Temperature; 0 for the likeliest token.")
    top_p: float = _option(0.95, "Nucleus that is sampled from.")
    max_new_tokens: int = _option(
        4096, "Tokens that a response may have. A response that reaches them is no trajectory."
    )
    seed: int = _option(42, "Seed.")
    max_samples: int | None = _option(None, "Number of rows to keep, from the first one.")
    engine: Literal["auto", "transformers", "vllm", "server"] = _option(
        "auto",
        "`auto` for a server where `server_url` is set, vLLM where it is installed, and transformers otherwise.",
    )
    server_url: str | None = _option(None, "Address of a stock vLLM server of the expert.")
    batch_size: int | None = _option(
        None,
        "Prompts a batch; the responses are saved after each. If not set, 8 (transformers), 512 (vllm), 64 (server).",
    )
    dtype: str = _option("auto", "Data type of the expert's weights.")
    tensor_parallel_size: int | None = _option(None, "Devices that vLLM spreads the expert over.")
    gpu_memory_utilization: float | None = _option(None, "Share of the memory that vLLM may use.")
    max_model_len: int | None = _option(None, "Longest sequence that vLLM makes room for.")


@dataclass
class HintArguments:
    """Arguments of `mentor-trl data hints`."""

    dataset_name: str | None = _option(
        None,
        "Dataset with the columns `prompt` and `trajectory`: Hub id, file, or folder that `mentor-trl data` made.",
    )
    dataset_config: str | None = _option(None, "Configuration of a Hub dataset.")
    dataset_split: str = _option("train", "Split whose prompts get hints. The other splits stay as they are.")
    fraction: float = _option(0.5, "Share of the trajectory to show.")
    part: HintPart = _option(
        "trajectory", "What the share is of: the whole response (trajectory), or what follows </think> (solution)."
    )
    tokenizer: str | None = _option(
        None, "Hub id or folder of the tokenizer that counts the share. If not set, characters are counted."
    )
    drop_without_trajectory: bool = _option(
        False, "Whether to drop rows that get no hint, instead of keeping the plain question."
    )


@dataclass
class OutputArguments:
    """Arguments about where a dataset goes."""

    output_dir: str | None = _option(None, "Folder to make.")
    output_format: Literal["parquet", "arrow"] = _option(
        "parquet",
        "`parquet` is the layout of a Hub repository, for `load_dataset` and `mentor-trl train`; `arrow` is that of "
        "`save_to_disk`, for `load_from_disk` and `mentor-trl train`.",
    )
    push_to_hub: str | None = _option(None, "Id of the Hub dataset to upload to.")
    private: bool = _option(False, "Whether a Hub dataset that is made anew is private.")


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
