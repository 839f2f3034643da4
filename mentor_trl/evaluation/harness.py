"""
lm-eval as the harness: it builds the prompts, batches them and talks to the models.

What is added: the paper's settings for each set, sampling that does not depend on a model's generation config, a limit
of new tokens that fits the model, and samples in one form for all back-ends.
"""

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mentor_trl.data import MENTOR_SYSTEM_PROMPT
from mentor_trl.data.problems import TEST_SETS
from mentor_trl.errors import SetupError

from . import TASKS
from .graded_rows import CORRECT, grade_by_math_verify
from .summary import TaskRun
from .token_limit import MAX_NEW_TOKENS, limited


if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task


TASK_FOLDER = Path(__file__).with_name("tasks")
BACKENDS = ("hf", "vllm", "server")
SAMPLING_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Settings:
    """How completions are drawn; the fields are options of `mentor-trl eval`, whose help says what they do."""

    num_samples: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    system_prompt: str = "mentor"
    apply_chat_template: bool = True
    limit: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SetupError(f"`{name}` is {value}; it must be 1 or more")
        if self.temperature is not None and self.temperature < 0:
            raise SetupError(f"`temperature` is {self.temperature}; it must be 0 (greedy) or more")

    def resolve(self, repeats: int) -> tuple[int, float]:
        """Return the number of samples and the temperature, for a set whose task file asks for `repeats` samples."""
        num_samples = self.num_samples or repeats
        temperature = self.temperature
        if temperature is None:
            temperature = SAMPLING_TEMPERATURE if num_samples > 1 else 0.0
        if num_samples > 1 and temperature == 0:
            raise SetupError(
                f"{num_samples} samples a problem are asked for at temperature 0, which are all the same; set "
                "`temperature` above 0, or `num_samples` to 1"
            )
        return num_samples, temperature

    def system_text(self) -> str | None:
        """Return the system prompt as lm-eval takes it."""
        text = {"mentor": MENTOR_SYSTEM_PROMPT, "none": None}.get(self.system_prompt, self.system_prompt)
        return text if not text or self.apply_chat_template else f"{text}\n\n"


def require_lm_eval() -> None:
    """Raise [`~mentor_trl.errors.SetupError`] where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise SetupError("Evaluation needs lm-eval, which is not installed; run `pip install 'mentor-trl[eval]'`")


def load_tasks(names: Sequence[str], data_dir: str | None = None) -> "dict[str, Task]":
    """Load lm-eval's task of each set, with problems from a folder of local files or, if none is given, the Hub."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise SetupError(f"There is no set '{unknown[0]}' (`tasks`); choose from {', '.join(TASKS)}")
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    metadata = {"data_dir": data_dir} if data_dir else {}
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)
    logger = logging.getLogger("lm_eval.api.task")  # it explains a command-line option of lm-eval's for each set
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return {name: manager.load([f"mentor_{name}"])["tasks"][f"mentor_{name}"] for name in names}
    finally:
        logger.setLevel(level)


def make_model(
    backend: str,
    model: str,
    model_args: dict[str, Any] | None = None,
    batch_size: int | str | None = None,
    device: str | None = None,
    base_url: str | None = None,
    apply_chat_template: bool = True,
    seed: int = 0,
) -> "LM":
    """Make lm-eval's model; the arguments are the options of `mentor-trl eval`."""
    require_lm_eval()
    if backend == "server":
        from .server_client import make_server_model

        return make_server_model(model, base_url, model_args or {}, apply_chat_template, seed)
    if backend not in BACKENDS:
        raise SetupError(f"The back-end '{backend}' is not known; choose one of {', '.join(BACKENDS)}")
    if backend == "vllm":
        _require_vllm()
    from lm_eval.api.registry import get_model

    seeded = {"seed": seed} if backend == "vllm" else {}
    args = {**seeded, **_weights(backend, model), "dtype": "auto", **(model_args or {})}
    batch_size = batch_size or {"hf": 16, "vllm": "auto"}[backend]
    if backend == "hf" and device is None and not torch.cuda.is_available():
        device = "cpu"
    try:
        return get_model(backend).create_from_arg_obj(args, {"batch_size": batch_size, "device": device})
    except (OSError, TypeError, ValueError) as error:  # no such model, or arguments that it does not take
        raise SetupError(f"The model {model} cannot be loaded: {error}") from error


def _require_vllm() -> None:
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        raise SetupError(
            "The back-end `vllm` needs the package vllm, which is not installed (another build of it does not suffice "
            "for lm-eval); run `pip install 'mentor-trl[vllm]'`, or set `backend` to server"
        ) from error


def _weights(backend: str, model: str) -> dict[str, str]:
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return {"pretrained": model}
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return {"pretrained": base, {"hf": "peft", "vllm": "lora_local_path"}[backend]: model}


def has_chat_template(model: str, **kwargs: Any) -> bool:
    """Tell whether the tokenizer of a model (Hub id or folder) has a chat template."""
    from transformers import AutoTokenizer

    try:
        return bool(AutoTokenizer.from_pretrained(model, **kwargs).chat_template)
    except (OSError, ValueError) as error:
        raise SetupError(f"The tokenizer of {model} cannot be loaded: {error}") from error


def run_task(lm: "LM", name: str, task: "Task", settings: Settings, backend: str) -> TaskRun | None:
    """Evaluate a model of [`make_model`] on a set of [`load_tasks`]; `None` on all processes but the first."""
    # Not `simple_evaluate`, which spends seconds on a survey of the machine for each set
    from lm_eval import evaluate
    from transformers import set_seed

    num_samples, temperature = settings.resolve(task.config.repeats)
    task.set_config("repeats", num_samples)
    task.set_config("generation_kwargs", generation_kwargs(backend, settings, temperature))
    task.set_config("description", "")  # the system prompt of the task file, which `system_instruction` replaces
    set_seed(settings.seed)
    with limited(lm, settings.max_new_tokens) as limit:
        results = evaluate(
            lm,
            {"tasks": {task.config.task: task}},
            limit=settings.limit,
            system_instruction=settings.system_text(),
            apply_chat_template=settings.apply_chat_template,
            bootstrap_iters=0,
        )
    if results is None:
        return None
    rows = sorted(results["samples"][task.config.task], key=lambda row: row["doc_id"])
    samples = [_sample(name, row) for row in rows]
    _add_math_verify([sample for sample, row in zip(samples, rows) if not row["doc"]["choices"]])
    print(f"{TASKS[name]}: {limit}.", flush=True)
    return TaskRun(name, num_samples, temperature, TEST_SETS[name].on_hub, samples, limit.value, limit.room)


def generation_kwargs(backend: str, settings: Settings, temperature: float) -> dict[str, Any]:
    """
    Return the sampling options of a back-end, all explicit, so that no model's generation config changes them. The
    limit of new tokens is the largest, until the prompts are known.
    """
    kwargs: dict[str, Any] = {
        "until": [],
        "max_gen_toks": settings.max_new_tokens or MAX_NEW_TOKENS,
        "do_sample": temperature > 0,
        "temperature": temperature,
        "repetition_penalty": 1.0,
    }
    if temperature > 0:
        kwargs |= {"top_p": settings.top_p, "top_k": 0 if backend == "hf" else -1}
    return kwargs


def _sample(task: str, row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["arguments"][0][0]
    verdicts = row["filtered_resps"][0]
    return {
        "doc_id": row["doc_id"],
        "task": task,
        "prompt": prompt if isinstance(prompt, str) else prompt[0],
        "completions": [str(text) for text in row["resps"][0]],
        "truncated": [int(getattr(text, "cut", False)) for text in row["resps"][0]],
        "correct": [int(verdict == CORRECT) for verdict in verdicts],
        "answer": row["target"],
        "verdicts": list(verdicts),
    }


def _add_math_verify(samples: list[dict[str, Any]]) -> None:
    pairs = [(text, sample["answer"]) for sample in samples for text in sample["completions"]]
    graded = iter(grade_by_math_verify(*zip(*pairs)) if pairs else ())
    for sample in samples:
        sample["math_verify"] = [next(graded) for _ in sample["completions"]]
