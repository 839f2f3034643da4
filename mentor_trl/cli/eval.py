"""
Evaluate a model on the sets of the MENTOR paper; what `mentor-trl eval` runs.

```bash
mentor-trl eval --model outputs/mentor --tasks math500 aime24 --backend vllm --output_dir results
mentor-trl eval --model outputs/mentor --num_processes 8      # the hf back-end on eight GPUs, through accelerate
```
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markdown import Markdown

from mentor_trl.config_fields import option
from mentor_trl.errors import SetupError
from mentor_trl.evaluation import PAPER_TASKS, TASKS
from mentor_trl.files import write_whole
from mentor_trl.rewards import GRADER_VERSION


if TYPE_CHECKING:
    from mentor_trl.cli.parser import MentorArgumentParser
    from mentor_trl.evaluation.harness import Settings


@dataclass
class EvalModelArguments:
    """Arguments of `mentor-trl eval` about the model; each field's help says what it does."""

    model: str | None = option(
        None, "Hub id or folder of the model or of a PEFT adapter; for a server, the name it serves the model under."
    )
    backend: Literal["hf", "vllm", "server"] = option(
        "hf", "What generates: `hf` (transformers), `vllm`, or `server` (any OpenAI-compatible server)."
    )
    base_url: str | None = option(None, "Address of the server, as http://127.0.0.1:8000/v1.")
    model_args: str | None = option(
        None,
        "Further arguments of lm-eval's model class, as `key=value,key=value`: `tensor_parallel_size=4`, "
        "`data_parallel_size=2` or `gpu_memory_utilization=0.8` (vllm), `dtype=float32` or `parallelize=True` (hf), "
        "`num_concurrent=64` (server).",
    )
    batch_size: str | None = option(None, "Prompts a batch, or `auto`. If not set, 16 for `hf`, `auto` for `vllm`.")
    device: str | None = option(None, "Device of the `hf` back-end, as cuda:0 or cpu.")
    apply_chat_template: bool | None = option(
        None,
        "Whether prompts are messages (True), or text (False): system prompt, empty line, question. If not set, "
        "messages when the tokenizer has a chat template, and always for a server.",
    )


@dataclass
class EvalDataArguments:
    """Arguments of `mentor-trl eval` about the sets and the sampling."""

    tasks: list[str] | None = option(None, f"Sets to evaluate on: {', '.join(TASKS)}. If not set, the paper's nine.")
    data_dir: str | None = option(None, "Folder of local files of the sets. If not set, they come from the Hub.")
    limit: int | None = option(None, "Number of problems of each set, from the first one, for a trial run.")
    system_prompt: str = option("mentor", "System prompt, `mentor` for the paper's, or `none`.")
    num_samples: int | None = option(
        None, "Completions a problem. If not set, 32 for aime24, aime25 and amc23 and 1 for the other sets."
    )
    temperature: float | None = option(
        None, "Sampling temperature. If not set, 0 (greedy) for one completion a problem and 0.6 for several."
    )
    top_p: float = option(1.0, "Probability mass to sample from.")
    max_new_tokens: int | None = option(
        None,
        "Most tokens of a completion. If not set, what the longest prompt of a set leaves of the model's context, at "
        "most 8192, the paper's limit.",
    )
    seed: int = option(0, "Seed of the sampling.")


@dataclass
class EvalReportArguments:
    """Arguments of `mentor-trl eval` about what is written."""

    output_dir: str = option("results", "Folder for results.json, results.md and samples_*.jsonl.")
    overwrite_output_dir: bool = option(False, "Whether to replace the results in `output_dir`.")
    paper_model: Literal["Qwen2.5-7B", "Qwen2.5-3B", "Llama-3.1-8B"] = option(
        "Qwen2.5-7B", "Base model of the paper's rows in the table."
    )
    model_card: str | None = option(None, "Folder of a model whose README.md gets the results as `model-index`.")
    push_results: str | None = option(None, "Model on the Hub whose card gets the results as `model-index`.")


def make_parser() -> "MentorArgumentParser":
    """Build the parser of the script."""
    from mentor_trl.cli.parser import MentorArgumentParser

    classes = {"model": EvalModelArguments, "sets and sampling": EvalDataArguments, "report": EvalReportArguments}
    return MentorArgumentParser(
        tuple(classes.values()),
        sections=classes,
        prog="mentor-trl eval",
        description="Evaluate on the sets of the MENTOR paper. A config file sets any field below; flags override it.",
        epilog="Options of `accelerate launch` (--num_processes, ...) run the hf back-end on several devices.",
    )


def _parse_model_args(text: str | None) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    if text and not all("=" in part for part in text.split(",") if part):
        raise SetupError(f"`model_args` is {text!r}; write it as key=value,key=value")
    return simple_parse_args_string(text or "")


def _make_settings(model_args: EvalModelArguments, data_args: EvalDataArguments, extra: dict[str, Any]) -> "Settings":
    from mentor_trl.evaluation.harness import Settings, has_chat_template

    chat = model_args.apply_chat_template
    if model_args.backend != "server" and chat is not False:
        options = {key: extra[key] for key in ("revision", "trust_remote_code") if key in extra}
        available = has_chat_template(str(extra.get("tokenizer", model_args.model)), **options)
        if chat and not available:
            raise SetupError(
                f"`apply_chat_template` is true, but the tokenizer of {model_args.model} has no chat template; set it "
                "to false for prompts that are text"
            )
        if not available:
            print(f"The tokenizer of {model_args.model} has no chat template: prompts are text.", flush=True)
        chat = available
    names = ("num_samples", "temperature", "top_p", "max_new_tokens", "system_prompt", "limit", "seed")
    return Settings(apply_chat_template=chat is not False, **{name: getattr(data_args, name) for name in names})


def _output_folder(report_args: EvalReportArguments) -> Path:
    folder = Path(report_args.output_dir).expanduser()
    if (folder / "results.json").exists() and not report_args.overwrite_output_dir:
        raise SetupError(
            f"The folder {folder} (`output_dir`) already holds results; choose another, or set `overwrite_output_dir`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_card_options(report_args: EvalReportArguments, limit: int | None) -> None:
    if (report_args.model_card or report_args.push_results) and limit is not None:
        raise SetupError("`limit` gives no result for a model card; leave `model_card` and `push_results` out")
    if report_args.model_card and not Path(report_args.model_card).expanduser().is_dir():
        raise SetupError(f"The folder {report_args.model_card} (`model_card`) does not exist")


def _settings_record(model_args: EvalModelArguments, settings: "Settings") -> dict[str, Any]:
    packages = ("mentor-trl", "lm-eval", "math-verify", "transformers", "torch", "vllm")
    versions: dict[str, Any] = {"grader": GRADER_VERSION}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    record = {"backend": model_args.backend, "model_args": model_args.model_args, **asdict(settings)}
    return {**record, "versions": versions}


def main(model_args: EvalModelArguments, data_args: EvalDataArguments, report_args: EvalReportArguments) -> None:
    """Evaluate and report; the arguments are the parsed options, by group."""
    from mentor_trl.evaluation import harness
    from mentor_trl.evaluation.summary import collect, summarize, to_markdown, write_samples

    harness.require_lm_eval()
    if not model_args.model:
        raise SetupError("No model is given; set `model` to a Hub id, a folder, or the name a server uses")
    _check_card_options(report_args, data_args.limit)
    extra = _parse_model_args(model_args.model_args)
    settings = _make_settings(model_args, data_args, extra)
    tasks = harness.load_tasks(list(dict.fromkeys(data_args.tasks or PAPER_TASKS)), data_args.data_dir)
    for task in tasks.values():
        settings.resolve(task.config.repeats)
    folder = _output_folder(report_args)
    options = {name: getattr(model_args, name) for name in ("batch_size", "device", "base_url")}
    options |= {"apply_chat_template": settings.apply_chat_template, "seed": settings.seed}
    lm = harness.make_model(model_args.backend, model_args.model, extra, **options)
    summaries = {}
    for name, task in tasks.items():
        run = harness.run_task(lm, name, task, settings, model_args.backend)
        if run is None:  # another process than the first
            continue
        write_samples(run, folder)
        summaries[name] = summarize(run)
        results = collect(model_args.model, _settings_record(model_args, settings), summaries)
        report = to_markdown(results, report_args.paper_model)
        # After each set, so that an interrupted run leaves what it has.
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_whole(folder / "results.md", report)
    if summaries:
        _show(report)
        print(f"Results and samples are in {folder}.")
        _publish(results, report_args)


def _show(report: str) -> None:
    """Print a report of Markdown: drawn in a terminal, as it is in a file or a pipe."""
    console = Console()
    console.print(Markdown(report)) if console.is_terminal else print(report)


def _publish(results: dict[str, Any], report_args: EvalReportArguments) -> None:
    from mentor_trl.publishing import model_index

    name = Path(results["model"]).name
    if report_args.model_card:
        print(f"Card: {model_index.write_card(report_args.model_card, model_index.model_index(results), name)}")
    if report_args.push_results:
        print(f"Card: {model_index.push_card(report_args.push_results, model_index.model_index(results))}")


def run(args: list[str] | None = None) -> int:
    """Parse the command line and evaluate."""
    return make_parser().run(args, main)


if __name__ == "__main__":
    raise SystemExit(run())
