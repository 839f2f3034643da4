r"""
Tokens per second of the vLLM engine, side by side in one run: a plain vLLM engine that holds the policy alone, and the
mixed engine at gamma = infinity and at mean weights E[w], over draft lengths.

    python benchmarks/rollout_vllm.py                       # CPU, about ten minutes
    python benchmarks/rollout_vllm.py --hidden 1536 --layers 28 --vocab 151936 --dtype bfloat16 --batch 256

The policy has random weights. The expert is the policy with noise on its LM head: more noise, less acceptance. The
expert's weight at a token is that of the branch rule "random", which does not depend on the random weights. Each
engine runs in a process of its own; the median of the repeats is reported.
"""

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import tempfile
import time

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common import device_name, save_models


INF = float("inf")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="completion tokens of a row")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--noise", type=float, default=0.1, help="noise on the expert's LM head, in its own deviations"
    )
    parser.add_argument("--share", type=float, nargs="+", default=[0.07, 0.15, 0.3], help="mean weights E[w]")
    parser.add_argument("--draft-length", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.3, help="share of the memory that an engine takes")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and compilation")
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args()


def engine_kwargs(args: argparse.Namespace) -> dict:
    return {
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "max_model_len": args.prompt + args.tokens,
        "max_num_seqs": args.batch,
        "gpu_memory_utilization": args.memory,
        "enforce_eager": args.eager,
        "disable_log_stats": True,
    }


def prompts(args: argparse.Namespace) -> list[list[int]]:
    shape = (args.batch, args.prompt)
    return torch.randint(0, args.vocab, shape, generator=torch.Generator().manual_seed(0)).tolist()


def timed(run, repeats: int) -> float:
    """Median seconds of `run`, after one run to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def plain(args: argparse.Namespace, folders: dict[str, str], results) -> None:
    from mentor_trl.vllm_plugin import engine_environment

    os.environ.update(engine_environment(cpu=not torch.cuda.is_available()))
    from vllm import LLM, SamplingParams

    llm = LLM(folders["policy"], **engine_kwargs(args))
    rows = [{"prompt_token_ids": ids} for ids in prompts(args)]
    for name, logprobs in (("plain vLLM, policy alone", None), ("the same with logprobs=0", 0)):
        params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)
        seconds = timed(lambda params=params: llm.generate(rows, params, use_tqdm=False), args.repeats)
        results.put({"arm": name, "tokens_per_second": args.batch * args.tokens / seconds})


def mixed(args: argparse.Namespace, folders: dict[str, str], draft_length: int, results) -> None:
    from mentor_trl.rollout import MixedRequest
    from mentor_trl.rollout.vllm.colocate import ColocateSampler

    sampler = ColocateSampler(folders["policy"], folders["expert"], draft_length=draft_length, **engine_kwargs(args))
    rows, last = prompts(args), {}
    for share in (0.0, *args.share):
        gamma = INF if share == 0.0 else 1.0
        request = MixedRequest(rows, [gamma] * len(rows), args.tokens, (), branch_rule="random", share=share)

        def run(request=request):
            last["rollout"] = sampler.sample(request)

        seconds = timed(run, args.repeats)
        stats = last["rollout"].stats
        results.put(
            {
                "arm": "mixed, gamma = inf" if share == 0.0 else f"mixed, E[w] = {share:g}",
                "draft_length": draft_length,
                "acceptance": 1.0 - stats["replaced"] / stats["tokens"],
                "entropy": last["rollout"].entropies.nanmean().item(),
                "tokens_per_second": args.batch * args.tokens / seconds,
            }
        )


def collect(target, *arguments) -> list[dict]:
    """What `target(*arguments, queue)` puts into the queue, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results, found = context.Queue(), []
    process = context.Process(target=target, args=(*arguments, results))
    process.start()
    while process.is_alive() or not results.empty():
        try:
            found.append(results.get(timeout=1.0))
        except queue.Empty:
            continue
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed with exit code {process.exitcode}")
    return found


def main() -> None:
    args, cuda = parse_args(), torch.cuda.is_available()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as root:
        folders = save_models(
            root, args.noise, hidden=args.hidden, layers=args.layers, vocab=args.vocab, dtype=args.dtype
        )
        found = collect(plain, args, folders)
        for draft_length in args.draft_length:
            found += collect(mixed, args, folders, draft_length)
    base = found[0]["tokens_per_second"]
    shape = f"{args.layers} layers of {args.hidden}, vocabulary {args.vocab}, {args.dtype}"
    table = Table(title=f"{args.batch} rows of {args.prompt} + {args.tokens} tokens; {shape}; {device_name(cuda)}")
    for heading in ("arm", "K", "acceptance", "tokens/s", "of plain"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in found:
        speed = row["tokens_per_second"]
        accepted = f"{row['acceptance']:.3f}" if "acceptance" in row else ""
        table.add_row(
            escape(row["arm"]), str(row.get("draft_length", "")), accepted, f"{speed:,.0f}", f"{speed / base:.2f}"
        )
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"args": vars(args), "device": device_name(cuda), "results": found}, file, indent=2)


if __name__ == "__main__":
    main()
