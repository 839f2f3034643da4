"""
Run the study: train every arm on every task with every seed, evaluate its checkpoints, and write a line of JSON a run.

Each training is what `mentor-trl train` and `trl sft` launch, with the recipes that study.yaml names. What is finished is
never run again, so the study can be killed and started again.

```bash
python -m benchmarks.study.run small                                # what `make study-small` runs
python -m benchmarks.study.run head_to_head --tasks chain --jobs 2
python -m benchmarks.study.run ablation --list                      # what is left to run
```
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study import store
from benchmarks.study.arms import UNTRAINED, Plan, Run, Stage


OUTPUT = Path("outputs/study")
# As `accelerate launch` would set it for one process on a CPU
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
FORK = multiprocessing.get_context("fork")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = Plan.read()
    parser.add_argument("studies", nargs="+", choices=list(plan.config["studies"]))
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the JSON lines")
    parser.add_argument("--list", action="store_true", help="say what is left to run, and run nothing")
    options = parser.parse_args(argv)
    wanted = []
    for study in options.studies:
        done = store.done(options.results / f"{study}.jsonl")
        for run in plan.runs(study):
            chosen = (options.tasks, run.task), (options.arms, run.arm), (options.seeds, run.seed)
            if all(allowed is None or value in allowed for allowed, value in chosen) and run.key not in done:
                wanted.append(run)
    if options.list:
        print("\n".join(f"{run.study} {run.name} {run.label}" for run in wanted))
        print(f"{len(wanted)} runs are left.")
        return 0
    os.environ.update(ENVIRONMENT)
    warm_up()
    return 1 if run_all(wanted, options.jobs, options.results) else 0


def warm_up() -> None:
    """Import once what every training needs: a run is a fork of this process, and begins at once."""
    for name in ("torch", "trl.scripts.sft", "mentor_trl.cli.train", "mentor_trl.trainer", "benchmarks.study.evaluate"):
        importlib.import_module(name)
    from trl import SFTConfig, SFTTrainer  # noqa: F401  (trl imports them when they are asked for)

    sys.path.insert(0, str(Path.cwd()))


def run_all(runs: list[Run], jobs: int, results: Path) -> int:
    """Make runs, `jobs` at a time, and return how many failed."""
    waiting, running, failed, started = list(runs), {}, 0, time.time()
    prepared: set[tuple[str, int]] = set()
    preparing: dict[tuple[str, int], multiprocessing.Process] = {}
    ended = 0
    try:
        while waiting or running:
            for run in [run for run, process in running.items() if not process.is_alive()]:
                process = running.pop(run)
                process.join()
                ended += 1
                failed += process.exitcode != 0
                note = "" if process.exitcode == 0 else f"  FAILED, see {folder_of(run) / 'log.txt'}"
                minutes = (time.time() - started) / 60
                print(f"[{ended}/{len(runs)}, {minutes:.1f} min] {run.study} {run.name} {run.label}{note}", flush=True)
            for place in [place for place, process in preparing.items() if not process.is_alive()]:
                process = preparing.pop(place)
                if process.exitcode != 0:
                    raise SystemExit(f"The files of {place[0]}, seed {place[1]}, could not be prepared.")
                prepared.add(place)
            while waiting and len(running) + len(preparing) < jobs:
                ready = next((run for run in waiting if (run.task, run.seed) in prepared), None)
                if ready is not None:
                    waiting.remove(ready)
                    running[ready] = start(make, ready, results / f"{ready.study}.jsonl", log=folder_of(ready) / "log.txt")
                    continue
                places = [(run.task, run.seed) for run in waiting if (run.task, run.seed) not in preparing]
                if not places:
                    break
                preparing[places[0]] = start(prepare, *places[0], log=prepared_folder(*places[0]) / "log.txt")
            time.sleep(0.2)
    finally:
        for process in [*running.values(), *preparing.values()]:
            process.terminate()
    return failed


def start(function: Callable, *args: Any, log: Path) -> multiprocessing.Process:
    process = FORK.Process(target=logged, args=(function, args, log))
    process.start()
    return process


def logged(function: Callable, args: tuple, log: Path) -> None:
    """Call a function in this process, with what it prints in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            function(*args)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)


def prepared_folder(task: str, seed: int) -> Path:
    return OUTPUT / "prepared" / f"{task}-seed{seed}"


def prepare(task: str, seed: int) -> None:
    from benchmarks.study.prepare import prepare as make_files

    make_files(task, seed, prepared_folder(task, seed))


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
    commands, metrics, offset = [], {}, 0
    for position, stage in enumerate(run.stages):
        target = folder / f"stage{position}"
        command = command_of(stage, run, model, prepared, target)
        commands.append(" ".join(command))
        within(train, command)
        history = history_of(target)
        spent = {one.step: one for one in costs(stage, run, history, facts, prepared)}
        before = points[-1][2]
        for step in sorted(int(path.name.split("-")[-1]) for path in target.glob("checkpoint-*")):
            here = {name: before[name] + getattr(spent[step], name) for name in before}
            points.append((offset + step, f"{target}/checkpoint-{step}", here))
        metrics |= {} if stage.supervised else interval_metrics(history, [p[0] - offset for p in points if p[0] >= offset])
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


def command_of(stage: Stage, run: Run, model: str, prepared: Path, target: Path) -> list[str]:
    """The command line of a stage."""
    places = {"expert": run.expert, "folder": str(prepared)}
    options = {
        "model_name_or_path": model,
        "seed": run.seed,
        "output_dir": str(target),
        "max_steps": stage.steps,
        "save_steps": run.evaluation["evaluate_every"],
    }
    if not stage.supervised:
        options |= {"dataset_name": f"{prepared}/data", "reward_funcs": f"benchmarks.study.tasks.{run.task}.reward"}
    options |= {key: value.format(**places) if isinstance(value, str) else value for key, value in stage.options.items()}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [*(["trl", "sft"] if stage.supervised else ["mentor-trl", "train"]), "--config", stage.recipe, *flags]


def train(command: list[str]) -> None:
    """Run the script that a command launches."""
    print(" ".join(command), flush=True)
    random.seed(0)
    if command[0] == "trl":
        from trl.scripts.sft import main as supervised
        from trl.scripts.sft import make_parser

        supervised(*make_parser().parse_args_and_config(command[2:]))
        return
    from mentor_trl.cli.train import run

    code = run(command[2:])
    if code:
        raise SystemExit(code)


def history_of(target: Path) -> list[dict[str, Any]]:
    last = max(target.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def costs(stage: Stage, run: Run, history: list[dict], facts: dict, prepared: Path) -> list:
    from benchmarks.study import cost

    sizes = facts["parameters"]["policy"], expert_parameters(run, facts)
    if stage.supervised:
        return cost.of_supervised(history, facts["sft_tokens"][run.expert], *sizes)
    return cost.of_rollouts(history, stage.options, *sizes)


def expert_parameters(run: Run, facts: dict) -> int:
    return facts["parameters"].get(f"expert_{run.expert}", 0)


def interval_metrics(history: list[dict[str, Any]], steps: list[int]) -> dict[str, list[float | None]]:
    """Means of what the trainer logged between one evaluation and the next."""
    names = sorted({name for entry in history for name in entry if name.startswith("mentor/")} | {"reward", "grad_norm"})
    means = {name: [] for name in names}
    for first, last in zip(steps, steps[1:]):
        part = [entry for entry in history if first < entry.get("step", 0) <= last]
        for name in names:
            values = [entry[name] for entry in part if entry.get(name) is not None]
            means[name].append(round(sum(values) / len(values), 6) if values else None)
    return means


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
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "mentor-trl")}


if __name__ == "__main__":
    raise SystemExit(main())
