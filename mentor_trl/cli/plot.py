"""`mentor-trl plot`: figures, tables and rollouts from the files that training and evaluation leave on disk."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..analysis.figures import PanelCurves, plot_guidance, plot_pass_at_k, plot_training, plot_words
from ..analysis.rates import REASONING_WORDS, pass_at_k_curves, word_rates
from ..analysis.rendering import print_rollout, to_html, to_list, to_svg
from ..analysis.results import make_table, read_results
from ..analysis.runs import read_runs
from ..analysis.samples import keep_tasks, read_samples
from ..analysis.style import check_output, save_figure
from ..errors import SetupError
from ..training.rollout_log import choose_rows, read_records


LABELS_HELP = "a name for each input, in their order; inputs of one name are seeds of one setting"


def make_parser() -> argparse.ArgumentParser:
    """Parser of `mentor-trl plot`."""
    parser = argparse.ArgumentParser(
        prog="mentor-trl plot",
        description="Figures, tables and rollouts from what training and evaluation leave on disk.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(title="what to plot", dest="kind", metavar="KIND", required=True)

    def add(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        kind.set_defaults(run=run)
        return kind

    training_kind = add("training", training, "accuracy, entropy and length against the step")
    _add_inputs(training_kind, "RUN", "folder of a run (its output_dir, or a checkpoint)", figure="training.png")
    _add_training(training_kind)
    guidance_kind = add("guidance", guidance, "what the expert did, against the step")
    _add_inputs(guidance_kind, "RUN", "folder of a run with mixed rollouts", figure="guidance.png")
    for kind in (training_kind, guidance_kind):
        kind.add_argument("--smooth", type=int, default=1, metavar="N", help="moving mean over N logged values (1)")
    words_kind = add("words", words, "share of the responses that contain words of reasoning")
    samples = "samples of `mentor-trl eval` or completions tables of training: .jsonl, .parquet, or a folder of them"
    _add_inputs(words_kind, "SAMPLES", samples, figure="words.png")
    _add_words(words_kind)
    pass_at_k_kind = add("pass-at-k", pass_at_k, "pass@k against k")
    samples = "samples of `mentor-trl eval`, with their grades: .jsonl, .parquet, or a folder of them"
    _add_inputs(pass_at_k_kind, "SAMPLES", samples, figure="pass_at_k.png")
    pass_at_k_kind.add_argument("--k", nargs="+", type=int, metavar="K", help="numbers of tries (1, 2, 4, ...)")
    for kind in (words_kind, pass_at_k_kind):
        kind.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all)")
    table_kind = add("table", table, "models against evaluation sets")
    _add_inputs(table_kind, "RESULTS", "results of `mentor-trl eval`: results.json or its folder")
    table_kind.add_argument("--metric", help="metric of the table, as pass@32 (pass@1 or avg@n, as evaluated)")
    table_kind.add_argument("--output", "-o", metavar="FILE", help="also write the table: .md or .csv")
    rollout_kind = add("rollout", rollout, "rollouts as text, with the tokens at which the expert spoke")
    rollout_kind.add_argument("run_folder", metavar="RUN", help="folder of a run trained with `log_rollout_records`")
    rollout_kind.add_argument("--step", type=int, metavar="N", help="training step (default: the last with records)")
    text = "rows to show (default: the first of a mixed rollout)"
    rollout_kind.add_argument("--row", type=int, nargs="+", metavar="I", help=text)
    rollout_kind.add_argument("--list", action="store_true", help="list the rows of the step instead of showing any")
    rollout_kind.add_argument("--html", metavar="FILE", help="write a page of HTML instead of printing")
    rollout_kind.add_argument("--svg", metavar="FILE", help="write a picture of what a terminal shows")
    return parser


def _add_inputs(parser: argparse.ArgumentParser, metavar: str, text: str, figure: str | None = None) -> None:
    parser.add_argument("inputs", nargs="+", metavar=metavar, help=text)
    parser.add_argument("--labels", nargs="+", metavar="NAME", help=f"{LABELS_HELP} (default: their folders)")
    if figure:
        text = f"figure to write: .png, .pdf or .svg ({figure})"
        parser.add_argument("--output", "-o", default=figure, metavar="FILE", help=text)


def _add_training(parser: argparse.ArgumentParser) -> None:
    panels, shown = ("accuracy", "reward", "entropy", "length"), ["accuracy", "entropy", "length"]
    parser.add_argument(
        "--panels", nargs="+", choices=panels, default=shown, help=f"panels to draw ({' '.join(shown)})"
    )
    text = "reward function that is the accuracy (accuracy_reward, or the only one beside format_reward)"
    parser.add_argument("--accuracy", metavar="NAME", help=text)
    text = "draw the evaluations made during training, on the dataset NAME if there were several"
    parser.add_argument("--eval", dest="evaluation", nargs="?", const=True, default=False, metavar="NAME", help=text)


def _add_words(parser: argparse.ArgumentParser) -> None:
    text = f"words to count, whole and in any case ({' '.join(REASONING_WORDS)})"
    parser.add_argument("--words", nargs="+", default=list(REASONING_WORDS), metavar="WORD", help=text)
    parser.add_argument("--all", action="store_true", help="count all responses to a prompt, not the first alone")
    parser.add_argument("--source", metavar="SOURCE", help="only rows of this source: on_policy, mixed or eval")


def main(args: list[str]) -> int:
    """Run `mentor-trl plot`; a mistake in the arguments or the files gives exit code 2 and one line."""
    options = make_parser().parse_args(args)
    try:
        options.run(options, Console())
    except (SetupError, OSError) as error:
        print(f"mentor-trl plot {options.kind}: error: {error}", file=sys.stderr)
        return 2
    return 0


def training(options: argparse.Namespace, console: Console) -> None:
    check_output(options.output)
    runs = read_runs(options.inputs, options.labels)
    if options.evaluation:
        runs = [run.evaluations(None if options.evaluation is True else options.evaluation) for run in runs]
    figure, shown = plot_training(
        runs, options.panels, options.accuracy, options.smooth, evaluation=bool(options.evaluation)
    )
    _tell_dropped(shown)
    _tell_saved(console, save_figure(figure, options.output))


def guidance(options: argparse.Namespace, console: Console) -> None:
    check_output(options.output)
    figure, shown = plot_guidance(read_runs(options.inputs, options.labels), options.smooth)
    _tell_dropped(shown)
    _tell_saved(console, save_figure(figure, options.output))


def words(options: argparse.Namespace, console: Console) -> None:
    check_output(options.output)
    sets = keep_tasks(read_samples(options.inputs, options.labels), options.tasks)
    rates = word_rates(sets, options.words, options.all, options.source)
    _print_frame(console, rates.pivot_table(index="word", columns="label", values="rate", sort=False), "rate")
    _tell_saved(console, save_figure(plot_words(rates), options.output))


def pass_at_k(options: argparse.Namespace, console: Console) -> None:
    check_output(options.output)
    sets = keep_tasks(read_samples(options.inputs, options.labels), options.tasks)
    curves = pass_at_k_curves(sets, options.k)
    for task, rows in curves.groupby("task", sort=False):
        frame = rows.pivot_table(index="k", columns="label", values="value", sort=False).sort_index()
        _print_frame(console, frame, f"pass@k, {task}")
    points = curves.groupby("task")["k"].transform("nunique")
    alone = dict.fromkeys(curves.loc[points == 1, "task"])  # a task with one sample a prompt has no curve
    if alone:
        print(f"Note: not drawn, for there is one k only: {', '.join(alone)}.", file=sys.stderr)
    if points.max() > 1:
        _tell_saved(console, save_figure(plot_pass_at_k(curves[points > 1]), options.output))


def table(options: argparse.Namespace, console: Console) -> None:
    output = Path(options.output) if options.output else None
    if output and output.suffix not in (".md", ".csv"):
        raise SetupError(f"The table's name {output} must end in .md or .csv.")
    made = make_table(read_results(options.inputs, options.labels), options.metric)
    console.print(made.to_rich())
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(made.to_markdown() if output.suffix == ".md" else made.to_csv(), encoding="utf-8")
        _tell_saved(console, output)


def rollout(options: argparse.Namespace, console: Console) -> None:
    records = read_records(options.run_folder, options.step)
    if options.list:
        console.print(to_list(records))
        return
    chosen = choose_rows(records, options.row)
    title = f"{Path(options.run_folder).resolve().name}, step {chosen[0].step}"
    for draw, target in ((to_html, options.html), (to_svg, options.svg)):
        if target:
            page = Path(target)
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(draw(chosen, title), encoding="utf-8")
            _tell_saved(console, page)
    if not options.html and not options.svg:
        for record in chosen:
            print_rollout(record, console)


def _tell_dropped(shown: list[PanelCurves]) -> None:
    for label in shown[0].curves:
        count = max((curve.dropped for one in shown for curve in one.curves[label].values()), default=0)
        if count:
            print(
                f"Note: the runs of {label!r} differ in their steps: up to {count} steps of a panel, which not all of "
                "them logged, are left out.",
                file=sys.stderr,
            )


def _tell_saved(console: Console, path: Path) -> None:
    console.print(f"Saved {path}", markup=False, highlight=False, soft_wrap=True)


def _print_frame(console: Console, frame, title: str) -> None:
    made = Table(title=title, title_justify="left")
    made.add_column(frame.index.name)
    for name in frame.columns:
        made.add_column(Text(str(name)), justify="right")
    for key, row in frame.iterrows():
        made.add_row(Text(str(key)), *("-" if value != value else f"{value:.3f}" for value in row))
    console.print(made)
