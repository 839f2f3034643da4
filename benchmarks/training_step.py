r"""
Seconds of a whole training step of MENTOR against plain GRPO, on the same number of rollouts of the same prompts, side
by side in one run.

    python benchmarks/training_step.py                      # engine in process, CPU, some minutes
    python benchmarks/training_step.py --withdrawn          # and without guidance, once `adaptive` has withdrawn it
    python benchmarks/training_step.py --engine server --eager --memory 0.1
    python benchmarks/training_step.py --engine colocate --hidden 1536 --layers 28 --vocab 151936 --dtype bfloat16 \
        --rows 128 --accumulate 8 --tokens 1024

`local` compares TRL's GRPOTrainer, which calls transformers' generate, with MENTOR in process. `colocate` compares
TRL's engine in its process with MENTOR's in its own. `server` starts `mentor-trl serve` or takes the one at --server;
the first row is MentorGRPOTrainer with alpha = 0, which is GRPO whose rows all come from the plain policy through that
same server, since TRL's own server mode pushes weights over NCCL alone. Where there are GPUs for it, --trl-server adds
TRL's GRPOTrainer with the `trl vllm-serve` at that URL.

Policy and expert have random weights: the expert is the policy with noise on its LM head. gamma is fixed such that the
mean weight of the expert is --weight; with --quantile it is the quantile of the entropies, which random weights make
almost equal, so that the expert speaks nearly everywhere. No row ends before its last token, so all trainers process
the same number of tokens; a run in which they did not ends with an error.

Each trainer lives in a process of its own. They take their steps in turn; --warmup of them are not counted. A step
lasts from `on_step_begin` to `on_step_end`. Sampling and new weights for an engine are what TRL's profiling contexts
around them say.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import ProfilingContext

from common import device_name, save_models, serving, word_tokenizer, working
from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer


SAMPLING = ("transformers.generate", "vLLM.generate", "mentor.on_policy", "mentor.mixed", "mentor.rollouts")
LOGGED = ("completions/mean_length", "mentor/weight", "mentor/acceptance", "mentor/branch_rate", "mentor/gamma")
LOGGED += ("completions/max_length", "completions/clipped_ratio")
LOGGED += ("mentor/on_policy/tokens_per_second", "mentor/mixed/tokens_per_second", "step_time")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("local", "server", "colocate"), default="local")
    parser.add_argument("--rows", type=int, default=32, help="rollouts of a step")
    parser.add_argument("--generations", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--mixed", type=int, default=4, help="mixed rollouts among them")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step's rows for forward and backward")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="completion tokens of a row")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--noise", type=float, default=0.1, help="noise on the expert's LM head")
    parser.add_argument("--policy", help="id or folder of a model, instead of random weights")
    parser.add_argument("--expert", help="id or folder of its expert")
    parser.add_argument("--draft-length", type=int, default=8)
    parser.add_argument("--weight", type=float, default=0.15, help="mean weight of the expert, E[w]")
    parser.add_argument("--quantile", type=float, help="gamma as this quantile of the entropies, instead of --weight")
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each trainer and seed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (at least 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--server", metavar="URL", help="a `mentor-trl serve` of --policy and --expert that runs")
    parser.add_argument("--trl-server", metavar="URL", help="a `trl vllm-serve` of --policy that runs, on a GPU")
    parser.add_argument("--weight-sync", default="folder", help="how weights reach the server: folder, nccl")
    parser.add_argument("--memory", type=float, default=0.3, help="share of the memory that a vLLM engine takes")
    parser.add_argument("--eager", action="store_true", help="start the server without CUDA graphs and compilation")
    parser.add_argument("--withdrawn", action="store_true", help="also time MENTOR without guidance, and its probes")
    parser.add_argument("--json", help="also write the results here")
    args = parser.parse_args()
    if args.rows % args.generations or args.rows % args.accumulate:
        parser.error(f"--rows {args.rows} must be a multiple of --generations and of --accumulate")
    if args.warmup < 1:
        parser.error("--warmup must be at least 1: the first step finds gamma")
    if args.withdrawn and (args.engine != "local" or args.rows < 2 * args.generations):
        parser.error("--withdrawn needs --engine local and at least two prompts a step")
    if bool(args.policy) != bool(args.expert):
        parser.error("--policy and --expert come together")
    if (args.server or args.trl_server) and not (args.policy and args.engine == "server"):
        parser.error("a server that runs needs --engine server, and --policy and --expert that it serves")
    if args.trl_server and args.device == "cpu":
        parser.error("--trl-server needs a GPU: TRL pushes weights to its server over NCCL")
    return args


@dataclass(frozen=True)
class Arm:
    """A trainer to time, and what its configuration has of its own."""

    name: str
    mentor: bool
    settings: dict


# Every reward is a success here, and no difference is large: guidance ends with the first batch
ENDING = {"alpha_schedule": "adaptive", "success_reward": -1.0, "guidance_margin": 1e9, "guidance_patience": 1}
WITHDRAWN = (
    Arm("MentorGRPOTrainer, guidance withdrawn", True, {**ENDING, "guidance_probe_every": 0}),
    Arm("MentorGRPOTrainer, a probe", True, {**ENDING, "guidance_probe_every": 1}),
)


def arms(args: argparse.Namespace, url: str | None) -> list[Arm]:
    """The trainers to compare; ratios are to the first."""
    local = Arm("TRL GRPOTrainer, `generate`", False, {})
    if args.engine == "local":
        return [local, Arm("MentorGRPOTrainer", True, {}), *(WITHDRAWN if args.withdrawn else ())]
    ignore_eos = {"generation_kwargs": {"ignore_eos": True}}
    if args.engine == "colocate":
        engine = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": args.memory,
            "vllm_max_model_length": context(args),
        }
        return [
            Arm("TRL GRPOTrainer, colocated vLLM", False, {**engine, **ignore_eos}),
            Arm("MentorGRPOTrainer, colocated vLLM", True, engine),
        ]
    engine = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
    ours = {**engine, "vllm_weight_sync": args.weight_sync}
    served = [
        Arm("MentorGRPOTrainer, alpha = 0, server", True, {**ours, "alpha": 0.0}),
        Arm("MentorGRPOTrainer, server", True, ours),
        local,
    ]
    if args.trl_server:
        theirs = {**engine, "vllm_server_base_url": args.trl_server, **ignore_eos}
        served.insert(0, Arm("TRL GRPOTrainer, its own server", False, theirs))
    return served


def context(args: argparse.Namespace) -> int:
    """Tokens that an engine must hold: near its limit it would draft less."""
    return args.prompt + args.tokens + 2 * args.draft_length


# Models and prompts


def make_models(args: argparse.Namespace, root: str) -> dict[str, str]:
    if args.policy:
        return {"policy": args.policy, "expert": args.expert}
    folders = save_models(root, args.noise, hidden=args.hidden, layers=args.layers, vocab=args.vocab, dtype=args.dtype)
    tokenizer = word_tokenizer(args.vocab)
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    return folders


def prompts(args: argparse.Namespace, tokenizer, count: int) -> Dataset:
    ids = torch.randint(2, len(tokenizer), (count, args.prompt), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"prompt": tokenizer.batch_decode(ids, skip_special_tokens=True)})


def even_share(completions, completion_ids, **kwargs) -> list[float]:
    """A reward that costs nothing and differs between the rows of a group."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


# A trainer in its process


def make_trainer(arm: Arm, args: argparse.Namespace, folders: dict[str, str], seed: int, output_dir: str):
    steps = args.warmup + args.repeats
    settings = {
        "output_dir": output_dir,
        "per_device_train_batch_size": args.rows // args.accumulate,
        "gradient_accumulation_steps": args.accumulate,
        "num_generations": args.generations,
        "max_completion_length": args.tokens,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": args.dtype},
        "seed": seed,
        **arm.settings,
    }
    trainer_class, config_class, kwargs = GRPOTrainer, GRPOConfig, {}
    if arm.mentor:
        trainer_class, config_class, kwargs = MentorGRPOTrainer, MentorGRPOConfig, {"expert": folders["expert"]}
        settings = {"alpha_schedule": "constant", **settings} | {
            "num_mixed_generations": args.mixed,
            "entropy_threshold_from": "current",  # benchmarks/engine_steps.py compares it with "previous"
            "guide_prompts": "all",  # mixed rows of every prompt, whatever the rewards
            "draft_length": args.draft_length,
            "rollout_batch_size": args.rows,
        }
        if args.quantile is not None:
            settings["entropy_quantile"] = args.quantile
    tokenizer = AutoTokenizer.from_pretrained(folders["policy"])
    dataset = prompts(args, tokenizer, steps * args.rows // args.generations)
    trainer = trainer_class(
        folders["policy"], even_share, config_class(**settings), dataset, processing_class=tokenizer, **kwargs
    )
    never_stop(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def never_stop(trainer) -> None:
    """Let rows end at their last token alone."""
    if trainer.use_vllm:  # TRL's own engine is told to ignore the end of a text
        trainer.eos_token_ids = []
        if isinstance(trainer, MentorGRPOTrainer):
            trainer.vllm_generation.stop_token_ids = ()
        return
    # transformers takes no stop id at all for "those of the model", so one that the model does not have
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = [trainer.model.config.vocab_size]
    trainer.generation_kwargs["eos_token_id"] = trainer.eos_token_ids


class Turns(TrainerCallback):
    """Waits for the trainer's turn before each step, and sends what the step took after it."""

    def __init__(self, trainer, connection, args: argparse.Namespace):
        self.trainer, self.connection, self.options = trainer, connection, args
        self.parts: dict[str, float] = defaultdict(float)
        ProfilingContext._log_metrics = lambda context, seconds: self._add(context.name, seconds)

    def _add(self, name: str, seconds: float) -> None:
        self.parts[name.split(".", 1)[1]] += seconds  # behind the name of the trainer's class

    def _now(self) -> float:
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.connection.recv()
        self.parts.clear()
        self.started, self.cpu_started = self._now(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds, self.cpu = self._now() - self.started, time.process_time() - self.cpu_started

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:  # the summary at the end
            return
        entropy, guidance = (
            logs.get("mentor/on_policy/entropy"),
            getattr(getattr(self.trainer, "algorithm", None), "guidance", None),
        )
        if guidance is not None and guidance.fixed is None and self.options.quantile is None:
            guidance.fixed = entropy / self.options.weight
        sampling = sum(self.parts[name] for name in SAMPLING)
        self.connection.send(
            {
                "seconds": self.seconds,
                "cpu": self.cpu,  # of the trainer's process alone
                "sampling": sampling,
                "weights": self.parts["sync_weights"],
                "rest": self.seconds - sampling - self.parts["sync_weights"],
                "parts": dict(self.parts),
                "logged": {name: logs[name] for name in LOGGED if logs.get(name) is not None},
            }
        )


def work(arm: Arm, args: argparse.Namespace, folders: dict[str, str], seed: int, connection) -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(arm, args, folders, seed, output_dir)
        trainer.add_callback(Turns(trainer, connection, args))
        connection.send("ready")
        trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# All of them, in turn


def measure(args: argparse.Namespace, folders: dict[str, str], url: str | None) -> dict[str, list[dict]]:
    """The counted steps of each trainer, in the order in which they were made."""
    found: dict[str, list[dict]] = defaultdict(list)
    for seed in args.seeds:
        with ExitStack() as stack:
            # One after the other: an engine takes its share of the memory that it finds
            chosen = arms(args, url)
            workers = [stack.enter_context(working(arm.name, work, arm, args, folders, seed)) for arm in chosen]
            for turn in range(args.warmup + args.repeats):
                for worker in workers:
                    step = worker.ask("step")
                    check_length(worker.name, step, args.tokens)
                    if turn >= args.warmup:
                        found[worker.name].append({"seed": seed, **step})
    return found


def check_length(name: str, step: dict, tokens: int) -> None:
    length = step["logged"]["completions/mean_length"]
    if length != tokens:
        raise SystemExit(f"{name} sampled {length} tokens a row on average instead of {tokens}")


def summarize(found: dict[str, list[dict]]) -> list[dict]:
    """Medians; ratios are those of steps that were made one after the other."""
    base, rows = next(iter(found.values())), []
    for name, steps in found.items():
        row = {"arm": name}
        for part in ("seconds", "cpu", "sampling", "weights", "rest"):
            row[part] = statistics.median(step[part] for step in steps)
        row["spread"] = [pick(step["seconds"] for step in steps) for pick in (min, max)]
        ratios = [step["seconds"] / other["seconds"] for step, other in zip(steps, base)]
        row["ratio"], row["ratio_spread"] = statistics.median(ratios), [min(ratios), max(ratios)]
        for metric in LOGGED:
            values = [step["logged"][metric] for step in steps if metric in step["logged"]]
            if values:
                row[metric] = statistics.median(values)
        rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    lines = ["| trainer | s / step | sampling | new weights | rest | ratio | E[w] | acceptance |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = [row["arm"], "{:.2f} ({:.2f}-{:.2f})".format(row["seconds"], *row["spread"])]
        cells += [f"{row[part]:.2f}" for part in ("sampling", "weights", "rest")]
        cells.append("{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["ratio_spread"]))
        for metric in ("mentor/weight", "mentor/acceptance"):
            cells.append(f"{row[metric]:.3f}" if metric in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def server(args: argparse.Namespace, folders: dict[str, str], root: str):
    """A context of the server's URL."""
    if args.engine != "server" or args.server:
        return nullcontext(args.server)
    options = ["--draft-length", str(args.draft_length), "--dtype", args.dtype, "--max-model-len", str(context(args))]
    options += ["--max-num-seqs", str(args.rows), "--gpu-memory-utilization", str(args.memory)]
    options += ["--enforce-eager"] if args.eager else []
    return serving(folders["policy"], folders["expert"], Path(root, "server.log"), *options)


def main() -> None:
    args = parse_args()
    # Ended from outside, the server and the trainers end as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as root:
        folders = make_models(args, root)
        with server(args, folders, root) as url:
            found = measure(args, folders, url)
    rows, device = summarize(found), device_name(args.device == "cuda")
    shape = args.policy or f"{args.layers} layers of {args.hidden}, vocabulary {args.vocab:,}"
    print(f"{device}, torch {torch.__version__}; {shape}, {args.dtype}; {args.rows} rows of {args.prompt} +")
    print(f"{args.tokens} tokens, {args.mixed} of {args.generations} mixed; {args.repeats} steps x {len(args.seeds)}")
    print(f"seeds; medians, in brackets least and most; ratios to the first row\n\n{markdown(rows)}")
    if args.json:
        results = {"arguments": vars(args), "device": device, "summary": rows, "steps": found}
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
