"""
Run the study: train every arm on every task with every seed, evaluate its checkpoints, and write a line of JSON a run.

Each training is what `mentor-trl train` and `trl sft` launch, with the recipes that study.yaml names. What is finished
is never run again, so the study can be killed and started again.

```bash
python -m benchmarks.study.run small                                # what `make study-small` runs
python -m benchmarks.study.run head_to_head --tasks chain --jobs 2
python -m benchmarks.study.run ablation --list                      # what is left to run
```
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study import store
from benchmarks.study.arms import Plan, Run
from benchmarks.study.trial import FORK, folder_of, make, prepare, prepared_folder


# As `accelerate launch` would set it for one process on a CPU
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = Plan.read()
    parser.add_argument("studies", nargs="+", choices=list(plan.config["studies"]))
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the JSON lines")
    parser.add_argument("--model", help="Hub id or folder of the model of the task `real`")
    parser.add_argument("--list", action="store_true", help="say what is left to run, and run nothing")
    options = parser.parse_args(argv)
    wanted, finished = [], store.by_key(options.results)
    for study in options.studies:
        done = store.done(options.results / f"{study}.jsonl")
        for run in plan.runs(study):
            chosen = (options.tasks, run.task), (options.arms, run.arm), (options.seeds, run.seed)
            left_out = any(allowed is not None and value not in allowed for allowed, value in chosen)
            if left_out or (run.arm, run.key) in done:
                continue
            done.add((run.arm, run.key))
            if run.key in finished and not options.list:  # another study has made it
                line = finished[run.key] | {name: getattr(run, name) for name in ("study", "arm", "label")}
                store.add(options.results / f"{study}.jsonl", line)
            else:
                wanted.append(run)
    if options.list:
        print("\n".join(f"{run.study} {run.name} {run.label}" for run in wanted))
        print(f"{len(wanted)} runs are left.")
        return 0
    os.environ.update(ENVIRONMENT)
    warm_up()
    for task in sorted({run.task for run in wanted}):
        reason = why_not(task, options.model)
        if reason:
            print(f"SKIPPED: the task {task}, {sum(run.task == task for run in wanted)} runs: {reason}", flush=True)
            wanted = [run for run in wanted if run.task != task]
    return 1 if run_all(wanted, options.jobs, options.results, options.model) else 0


def why_not(task: str, model: str | None) -> str | None:
    """Why a task cannot be prepared here."""
    module = importlib.import_module(f"benchmarks.study.tasks.{task}")
    if hasattr(module, "find_model"):
        try:
            module.find_model(model)
        except module.ModelMissing as error:
            return str(error)
    return None


def warm_up() -> None:
    """Import once what every training needs: a run is a fork of this process, and begins at once."""
    for name in (
        "torch",
        "trl.scripts.sft",
        "mentor_trl.cli.train",
        "mentor_trl.trainer",
        "benchmarks.study.evaluate",
    ):
        importlib.import_module(name)
    from trl import SFTConfig, SFTTrainer  # noqa: F401  (trl imports them when they are asked for)

    sys.path.insert(0, str(Path.cwd()))


def run_all(runs: list[Run], jobs: int, results: Path, model: str | None = None) -> int:
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
                    running[ready] = start(
                        make, ready, results / f"{ready.study}.jsonl", log=folder_of(ready) / "log.txt"
                    )
                    continue
                places = [(run.task, run.seed) for run in waiting if (run.task, run.seed) not in preparing]
                if not places:
                    break
                log = prepared_folder(*places[0]) / "log.txt"
                preparing[places[0]] = start(prepare, *places[0], model, log=log)
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


if __name__ == "__main__":
    raise SystemExit(main())
