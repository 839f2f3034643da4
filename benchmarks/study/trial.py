"""One run of the study: prepare its files, train its stages, evaluate their checkpoints, and write its line."""

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.study import cost, store
from benchmarks.study.arms import UNTRAINED, Plan, Run, Stage


OUTPUT = Path("outputs/study")
FORK = multiprocessing.get_context("fork")


def prepared_folder(task: str, seed: int) -> Path:
    return OUTPUT / "prepared" / f"{task}-seed{seed}"


def prepare(task: str, seed: int, model: str | None) -> None:
    from benchmarks.study.prepare import prepare as make_files

    make_files(task, seed, prepared_folder(task, seed), model=model)


def folder_of(run: Run) -> Path:
    return OUTPUT / "runs" / run.study / f"{run.name}-{run.key}"


def make(run: Run, file: Path) -> None:
    """Train, evaluate, and add the line of a run."""
    folder, prepared = folder_of(run), prepared_folder(run.task, run.seed)
    for old in folder.glob("stage*"):
        shutil.rmtree(old)
    facts = json.loads((prepared / "prepared.json").read_text())
    model = f"{prepared}/models/policy"
    if run.arm in UNTRAINED:
        model = f"{prepared}/models/{UNTRAINED[run.arm].format(expert=run.expert)}"
    points = [(0, model, {"cost": 0.0, "expert_tokens": 0.0, "seconds": 0.0})]
    commands, metrics, offset, memory = [], {}, 0, None
    for position, stage in enumerate(run.stages):
        target = folder / f"stage{position}"
        command = command_of(stage, run, model, prepared, target, facts)
        commands.append(" ".join(command))
        memory = max(memory or 0, within(train, command))
        history = history_of(target)
        spent = {one.step: one for one in costs(stage, run, history, facts, target)}
        before = points[-1][2]
        for step in sorted(int(path.name.split("-")[-1]) for path in target.glob("checkpoint-*")):
            here = {name: before[name] + getattr(spent[step], name) for name in before}
            points.append((offset + step, f"{target}/checkpoint-{step}", here))
        steps = [step - offset for step, _, _ in points if step >= offset]
        extend(metrics, interval_metrics([] if stage.supervised else history, steps), offset, run)
        offset, model = offset + stage.steps, points[-1][1]
    evaluations = [evaluated(run, path, last=index == len(points) - 1) for index, (_, path, _) in enumerate(points)]
    line = {
        "key": run.key,
        **{name: getattr(run, name) for name in ("study", "task", "arm", "label", "expert", "seed")},
        "options": {key: value for stage in run.stages for key, value in stage.options.items()},
        "commands": commands,
        "steps": [step for step, _, _ in points],
        **{name: [one[name] for one in evaluations] for name in ("accuracy", "entropy", "length", "distinct")},
        "pass_at": {k: [one["pass_at"].get(k) for one in evaluations] for k in evaluations[-1]["pass_at"]},
        "describe": {k: [one["describe"][k] for one in evaluations] for k in evaluations[-1]["describe"]},
        **{name: [here[name] for _, _, here in points] for name in points[0][2]},
        "metrics": metrics,
        "memory": memory,
        "parameters": {"policy": facts["parameters"]["policy"], "expert": expert_parameters(run, facts)},
        "versions": versions(),
    }
    line["learning_rate"] = line["options"].get("learning_rate")
    store.add(file, line)
    for path in folder.glob("stage*"):
        shutil.rmtree(path)


def within(function: Callable, *args: Any) -> Any:
    """Call a function in a fork of this process, which keeps what it leaves behind to itself."""
    receiver, sender = FORK.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send(function(*args))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)

    process = FORK.Process(target=call)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")
    return result


def command_of(stage: Stage, run: Run, model: str, prepared: Path, target: Path, facts: dict[str, Any]) -> list[str]:
    """The command line of a stage."""
    score = facts["pass_at_1"].get(f"expert_{run.expert}")
    places = {"expert": run.expert, "folder": str(prepared), "expert_score": score}
    options = {
        "model_name_or_path": model,
        "seed": run.seed,
        "output_dir": str(target),
        "max_steps": stage.steps,
        "save_steps": run.evaluation["evaluate_every"],
    }
    if not stage.supervised:
        options |= {"dataset_name": f"{prepared}/data", "reward_funcs": f"benchmarks.study.tasks.{run.task}.reward"}
    options |= {
        key: value.format(**places) if isinstance(value, str) else value for key, value in stage.options.items()
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [*(["trl", "sft"] if stage.supervised else ["mentor-trl", "train"]), "--config", stage.recipe, *flags]


def train(command: list[str]) -> int:
    """Run the script that a command launches, and return the most memory, in bytes, that this process has had."""
    print(" ".join(command), flush=True)
    if command[0] == "trl":
        from trl.scripts.sft import main as supervised
        from trl.scripts.sft import make_parser

        supervised(*make_parser().parse_args_and_config(command[2:]))
    else:
        from mentor_trl.cli.train import run

        code = run(command[2:])
        if code:
            raise SystemExit(code)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def history_of(target: Path) -> list[dict[str, Any]]:
    last = max(target.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def costs(stage: Stage, run: Run, history: list[dict], facts: dict, target: Path) -> list[cost.Spent]:
    sizes, written = (facts["parameters"]["policy"], expert_parameters(run, facts)), facts["gold_tokens"]
    if stage.supervised:
        return cost.of_supervised(history, written[run.expert], *sizes, step_seconds=step_seconds(target))
    hinted = "hints_" in stage.options.get("dataset_name", "")
    hint_tokens = written[run.expert] / facts["source"]["settings"]["num_train_prompts"] if hinted else 0.0
    return cost.of_rollouts(history, stage.options, *sizes, hint_tokens)


def step_seconds(target: Path) -> float:
    """Time of a step between the first checkpoint and the last, where the trainer logs none."""
    written = sorted((int(path.name.split("-")[-1]), path.stat().st_mtime) for path in target.glob("checkpoint-*"))
    (first, start), (last, end) = written[0], written[-1]
    return (end - start) / max(last - first, 1)


def expert_parameters(run: Run, facts: dict) -> int:
    return facts["parameters"].get(f"expert_{run.expert}", 0)


def interval_metrics(history: list[dict[str, Any]], steps: list[int]) -> dict[str, list[float | None]]:
    """Means of what the trainer logged between one evaluation and the next."""
    names = sorted(
        {name for entry in history for name in entry if name.startswith("mentor/")} | {"reward", "grad_norm"}
    )
    means = {name: [] for name in names}
    for first, last in zip(steps, steps[1:]):
        part = [entry for entry in history if first < entry.get("step", 0) <= last]
        for name in names:
            values = [entry[name] for entry in part if entry.get(name) is not None]
            means[name].append(round(sum(values) / len(values), 6) if values else None)
    return means


def extend(metrics: dict[str, list], more: dict[str, list], offset: int, run: Run) -> None:
    """Put the means of a stage behind those of the stages before it; `None` where a stage has no such metric."""
    before, after = offset // run.evaluation["evaluate_every"], max(map(len, more.values()), default=0)
    for name in metrics.keys() | more.keys():
        metrics[name] = metrics.get(name, [None] * before) + more.get(name, [None] * after)


def evaluated(run: Run, path: str, last: bool) -> dict[str, Any]:
    """Evaluation of a model; that of the prepared policy, which many runs share, is kept."""
    samples = run.evaluation["final_samples" if last else "samples"]
    digest = store.key_of({**run.evaluation, "samples": samples, "path": path})
    kept = prepared_folder(run.task, run.seed) / f"evaluation-{digest}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    result = within(evaluate_model, run, path, samples)
    if "/prepared/" in path:
        kept.with_suffix(f".{os.getpid()}").write_text(json.dumps(result))
        kept.with_suffix(f".{os.getpid()}").replace(kept)
    return result


def evaluate_model(run: Run, path: str, samples: int) -> dict[str, Any]:
    import torch

    from benchmarks.study.evaluate import evaluate, read_rows

    torch.set_num_threads(1)
    task = importlib.import_module(f"benchmarks.study.tasks.{run.task}")
    rows = read_rows(prepared_folder(run.task, run.seed) / "data" / "test.jsonl", run.evaluation["prompts"])
    limit = Plan.read().config["tasks"][run.task]["max_completion_length"]
    return evaluate(path, rows, task.reward, task.describe, samples, limit)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "trl", "mentor-trl")}
