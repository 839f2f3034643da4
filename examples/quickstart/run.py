"""
Train a tiny model with GRPO and with MENTOR, from the same policy and with the same seeds, and compare them.

What is special here: nothing is downloaded. The first run makes the data and pretrains an expert and a policy of 0.1M
parameters (prepare.py). Every run then trains through the command line, with recipes/quickstart/{grpo,mentor}.yaml,
and its checkpoints are evaluated, without the expert, on prompts that no training has seen.

```bash
make quickstart
python examples/quickstart/run.py                                             # the same, in your own environment
python examples/quickstart/run.py --arms grpo mentor mentor_paper --seeds 1   # one seed; also without a correction
```
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


if TYPE_CHECKING:
    from examples.quickstart.evaluate import Evaluation, Run

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("outputs/quickstart")
ARMS = {"grpo": "GRPO", "mentor": "MENTOR", "mentor_paper": "MENTOR (paper)"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["grpo", "mentor"], help="recipes to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of training")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    args = parser.parse_args()
    set_up()

    console, start = Console(), time.time()
    with make_progress(console) as progress:
        prepare_models(progress)
    console.print(f"\nTraining {len(args.arms)} x {len(args.seeds)} runs, {args.jobs} at a time, like this:")
    training = [TrainingRun(arm, seed) for seed in args.seeds for arm in args.arms]
    for run in training[: len(args.arms)]:
        console.print(f"  mentor-trl {' '.join(run.options)}", style="cyan", soft_wrap=True)
    with make_progress(console) as progress:
        train_all(training, args.jobs, progress)
    with make_progress(console) as progress:
        policy, runs = evaluate_all(args.arms, args.seeds, progress)

    from examples.quickstart.report import write_report

    write_report(policy, runs, {arm: ARMS[arm] for arm in args.arms}, OUTPUT, console)
    console.print(f"Took {(time.time() - start) / 60:.1f} minutes.")
    return 0


def set_up() -> None:
    """Find the package and this example also where they are not installed; keep off the network and to one thread."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Models this small gain little from a second thread, and the other cores have the other runs.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1", CUDA_VISIBLE_DEVICES="")

    from transformers.utils import logging

    logging.disable_progress_bar()


def make_progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:29}"), BarColumn(30), TextColumn("{task.completed:>4.0f}/{task.total:.0f}")
    return Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console)


def prepare_models(progress: Progress) -> None:
    from examples.quickstart.prepare import prepare

    prepare(OUTPUT, progress)


class TrainingRun:
    """One arm with one seed, trained by the command line in a process of its own."""

    def __init__(self, arm: str, seed: int):
        self.name = f"{ARMS[arm]}, seed {seed}"
        self.recipe = Path(f"recipes/quickstart/{arm}.yaml")
        self.folder = run_folder(arm, seed)
        self.options = ["train", "--config", str(self.recipe), "--seed", str(seed), "--output_dir", str(self.folder)]
        self.max_steps = yaml.safe_load(self.recipe.read_text())["max_steps"]
        self.log = self.folder / "train.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [sys.executable, "-m", "mentor_trl.cli", *self.options, *launch]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def has_ended(self) -> bool:
        """Whether the process has ended well; it is an error if it has ended otherwise."""
        code = self.process.poll()
        if code:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(f"Training of {self.name} failed with exit code {code}; {self.log} ends with\n\n{tail}")
        return code == 0

    def read_progress(self) -> tuple[int, str]:
        """The number of steps done, and a note on the latest rewards, from the trainer's log."""
        file, name = self.folder / "log.jsonl", "mentor/on_policy/reward"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        rewards = [entry[name] for entry in entries if entry.get(name) is not None][-10:]
        note = f"on-policy reward {sum(rewards) / len(rewards):.2f}" if rewards else "starting"
        return sum("grad_norm" in entry for entry in entries), note


def run_folder(arm: str, seed: int) -> Path:
    return OUTPUT / "runs" / f"{arm}-seed{seed}"


def train_all(runs: list[TrainingRun], jobs: int, progress: Progress) -> None:
    """Train every run, `jobs` of them at a time. The first failure ends all."""
    bars = {run: progress.add_task(run.name, total=run.max_steps, start=False, note="") for run in runs}
    waiting, running = list(runs), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
                progress.start_task(bars[running[-1]])
            time.sleep(0.5)
            for run in list(running):
                ended = run.has_ended()
                steps, note = run.read_progress()
                progress.update(bars[run], completed=steps, note=note)
                if ended:
                    progress.stop_task(bars[run])
                    running.remove(run)
    finally:
        for run in running:
            run.process.terminate()


def evaluate_all(arms: list[str], seeds: list[int], progress: Progress) -> tuple["Evaluation", list["Run"]]:
    """Evaluate the policy as it was, and every checkpoint of every run, on the held-out prompts."""
    from examples.quickstart.evaluate import Run, evaluate, read_prompts

    rows = read_prompts(OUTPUT / "data" / "test.jsonl")
    policy = evaluate(OUTPUT / "models" / "policy", rows)
    runs = [Run.read(arm, seed, run_folder(arm, seed)) for arm in arms for seed in seeds]
    bar = progress.add_task("evaluating checkpoints", total=sum(len(run.checkpoints) for run in runs), note="")
    for run in runs:
        for step, path in run.checkpoints.items():
            run.curve[step] = evaluate(path, rows)
            progress.advance(bar)
    return policy, runs


if __name__ == "__main__":
    raise SystemExit(main())
