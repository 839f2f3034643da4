"""What training prints and writes into its log file: callbacks of the Trainer, and lines read at a glance."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from .step_line import StepLines, end_line, evaluation_line


LOG_FILE = "log.jsonl"
FILE_WIDTH = 100  # of lines that go to a file, where nothing says how wide it is read


def make_console() -> Console:
    """Of standard output as it is now."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


def show(*renderables: Any, console: Console | None = None, soft_wrap: bool = False) -> None:
    """Print above the bars, if there are any."""
    console = console or make_console()
    with tqdm.external_write_mode(file=sys.stdout):
        for renderable in renderables:
            console.print(renderable, soft_wrap=soft_wrap)


class _Lines:
    """A line for each entry of the log, or the entry as it is (`full`)."""

    def __init__(self, full: bool):
        super().__init__()
        self.full, self.lines = full, StepLines()

    def on_train_begin(self, args, state, control, **kwargs):
        self.lines.begin(state.global_step, state.log_history)
        if state.is_world_process_zero:
            start = f"from step {state.global_step} " if state.global_step else ""
            file = Path(args.output_dir, LOG_FILE)
            show(f"Training {start}to step {state.max_steps}. All metrics: {file}", soft_wrap=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        console = make_console()
        header, text = self._texts(logs, state, console.width)
        parts = [*header, text]
        if header:
            parts[-2] = Text(header[-1], style="bold")
        show(*parts, console=console, soft_wrap=self.full)

    def _texts(self, logs: dict[str, Any], state, width: int) -> tuple[list[str], str]:
        step = state.global_step
        if self.full:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in logs.items() if k != "total_flos"}
            return [], str(shown)
        if "train_runtime" in logs:
            return [], end_line(logs, step, self.lines.first) + self.lines.advice()
        if any(name.startswith("eval_") for name in logs):
            return [], evaluation_line(logs, step)
        if "loss" in logs:
            return self.lines.step_lines(logs, step, state.max_steps, width)
        values = (f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in logs.items() if k != "epoch")
        return [], f"Step {step}: {', '.join(values)}"


class LinePrinter(_Lines, PrinterCallback):
    """Lines without bars."""


class LineProgress(_Lines, ProgressCallback):
    """Lines above the Trainer's bars, which a log file does without."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        hidden = not (state.is_world_process_zero and sys.stderr.isatty())
        self.training_bar, self.current_step = tqdm(total=state.max_steps, dynamic_ncols=True, disable=hidden), 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class LogFile(TrainerCallback):
    """The Trainer's history in a file of the output folder, one JSON object a line, as it grows."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._write(args, state, state.log_history, "w")  # a run that goes on is known up to its checkpoint

    def on_log(self, args, state, control, **kwargs):
        self._write(args, state, state.log_history[-1:], "a")

    def _write(self, args, state, entries: list[dict[str, Any]], mode: str) -> None:
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir, LOG_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open(mode, encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry, default=str) + "\n" for entry in entries)


def fit_console(handler: CallbackHandler, log_format: str) -> None:
    """Put our callbacks in the place of the Trainer's. Those of a user or of a notebook stay."""
    for given, own in ((PrinterCallback, LinePrinter), (ProgressCallback, LineProgress)):
        for callback in [callback for callback in handler.callbacks if type(callback) is given]:
            handler.remove_callback(callback)
            handler.add_callback(own(log_format == "full"))
    handler.add_callback(LogFile())


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Do at once what would be done with a warning. A model gets its tokenizer's first and padding tokens: many
    checkpoints (Qwen's) differ there, and neither is read in training. A different end token is still the Trainer's to
    tell. Some tokenizers (Llama 3's) ask for a clean-up of spaces that transformers does not do to a BPE tokenizer.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "pad_token_id") if config is not None else ():
            setattr(config, name, getattr(tokenizer, name))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    if type(getattr(backend, "model", None)).__name__ == "BPE" and not forced:
        tokenizer.clean_up_tokenization_spaces = False
