r"""
Tokens per second of the in-process engine, side by side in one run: TRL's own generate path, plain policy sampling,
and mixed sampling over draft lengths and acceptance rates; and the cost per token against the sequence length.

    python benchmarks/rollout_local.py                      # CPU, about a quarter of an hour
    python benchmarks/rollout_local.py --device cuda --hidden 1536 --layers 28 --vocab 151936 --dtype bfloat16

The policy has random weights. The expert is the policy with noise on its LM head: more noise, less acceptance. The
expert's weight at a token is that of the branch rule "random" with the share given by --share, which does not depend
on the random weights. The arms of a comparison are timed in turn, and the median is reported.

The ceiling of mixed sampling is (committed tokens a round) / (K + e) of the plain engine's speed, where e is the
measured cost of one expert pass over K drafts, in policy steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LlamaForCausalLM
from trl.trainer.utils import pad

from common import add_noise, device_name, random_policy
from mentor_trl import LocalSampler, MixedRequest
from mentor_trl.rollout.local.decoder import Decoder, inference


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="rows")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=256, help="completion tokens of a row")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--share", type=float, default=0.15, help="weight of the expert, E[w]")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[1.0, 0.97, 0.9])
    parser.add_argument("--draft-length", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args()


def make_policy(args: argparse.Namespace) -> LlamaForCausalLM:
    return random_policy(args.hidden, args.layers, args.vocab, args.dtype, args.device)


def make_expert(policy: LlamaForCausalLM, noise: float) -> LlamaForCausalLM:
    expert = LlamaForCausalLM(policy.config).to(policy.device, policy.dtype).eval()
    expert.load_state_dict(policy.state_dict())
    add_noise(expert, noise)
    return expert


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """Prompts of half to all of the prompt length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(args.vocab, (args.batch, args.prompt), generator=generator).tolist()
    return [row[: args.prompt - i % (args.prompt // 2)] for i, row in enumerate(ids)]


def request(args: argparse.Namespace, mixed: bool, tokens: int | None = None) -> MixedRequest:
    gamma = 1.0 if mixed else float("inf")
    return MixedRequest(
        prompts(args), [gamma] * args.batch, tokens or args.tokens, (), branch_rule="random", share=args.share
    )


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(call: Callable, device: str) -> tuple[float, object]:
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


def in_turn(calls: dict[str, Callable], repeats: int, device: str) -> dict[str, tuple[float, object]]:
    """Median seconds and last result of each call, timed in turn after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results = {}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            elapsed, results[name] = timed(call, device)
            if repeat:
                seconds[name].append(elapsed)
    return {name: (statistics.median(seconds[name]), results[name]) for name in calls}


def sample(policy, sampler: LocalSampler, req: MixedRequest):
    with sampler.session(policy) as session:
        return session.sample(req)


def trl_generate(policy, args: argparse.Namespace) -> Callable:
    """What GRPOTrainer does without vLLM, with its generation config."""
    config = GenerationConfig(
        max_new_tokens=args.tokens,
        do_sample=True,
        pad_token_id=0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
    )
    policy.generation_config.eos_token_id = None
    tensors = [torch.tensor(ids) for ids in prompts(args)]
    ids = pad(tensors, padding_value=0, padding_side="left").to(args.device)
    mask = pad([torch.ones_like(t) for t in tensors], padding_value=0, padding_side="left").to(args.device)

    def call():
        with torch.no_grad():
            return policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)

    return call


def expert_pass(expert, args: argparse.Namespace, length: int) -> Callable:
    """One pass over `length` drafts a row behind half of a completion."""
    decoder = Decoder(expert, args.batch)
    context = args.prompt + args.tokens // 2
    positions = context + torch.arange(length, device=args.device).expand(args.batch, -1)
    ids = torch.zeros_like(positions)

    def call():
        with torch.no_grad(), inference(expert):
            decoder.forward(ids, positions, args.batch, context + length)

    return call


def find_noise(policy, args: argparse.Namespace, acceptance: float) -> float:
    """Noise on the expert's LM head that gives an acceptance, by bisection on short rollouts."""
    if acceptance >= 1.0:
        return 0.0
    low, high = 0.0, 8.0
    for _ in range(9):
        middle = (low + high) / 2
        sampler = LocalSampler(make_expert(policy, middle), rollout_batch_size=args.batch)
        stats = sample(policy, sampler, request(args, mixed=True, tokens=48)).stats
        if 1.0 - stats["replaced"] / stats["tokens"] > acceptance:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def compare_mixed(policy, args: argparse.Namespace, acceptance: float, console: Console) -> list[dict]:
    expert = make_expert(policy, find_noise(policy, args, acceptance))
    calls: dict[str, Callable] = {
        "trl": trl_generate(policy, args),
        "plain": lambda: sample(policy, LocalSampler(rollout_batch_size=args.batch), request(args, mixed=False)),
    }
    for k in args.draft_length:
        sampler = LocalSampler(expert, rollout_batch_size=args.batch, draft_length=k)
        calls[f"mixed {k}"] = lambda sampler=sampler: sample(policy, sampler, request(args, mixed=True))
        calls[f"pass {k}"] = expert_pass(expert, args, k)
    results = in_turn(calls, args.repeats, args.device)

    total = args.batch * args.tokens
    plain_seconds = results["plain"][0]
    step = plain_seconds / args.tokens
    rows = [
        {"arm": "TRL generate", "tokens_per_s": total / results["trl"][0]},
        {"arm": "plain", "tokens_per_s": total / plain_seconds},
    ]
    for k in args.draft_length:
        seconds, rollout = results[f"mixed {k}"]
        stats = rollout.stats
        cost = results[f"pass {k}"][0] / step
        committed = stats["tokens"] / stats["rounds"]
        ceiling = committed / (k + cost) * total / plain_seconds
        rows.append(
            {
                "arm": f"mixed, K = {k}",
                "acceptance": 1.0 - stats["replaced"] / stats["tokens"],
                "committed": committed,
                "e": cost,
                "tokens_per_s": total / seconds,
                "ceiling": ceiling,
                "of_ceiling": total / seconds / ceiling,
            }
        )
    for row in rows:
        row["of_plain"] = row["tokens_per_s"] * plain_seconds / total
    show(console, f"acceptance {acceptance}, E[w] {args.share}", rows)
    return rows


def compare_lengths(policy, args: argparse.Namespace, console: Console) -> list[dict]:
    """Cost per token against the length, beside that of TRL's generate path, which grows by attention alone."""
    expert = make_expert(policy, 0.0)
    rows = []
    for tokens in args.lengths:
        part = argparse.Namespace(**{**vars(args), "tokens": tokens, "batch": min(args.batch, 16)})
        sampler = LocalSampler(expert, rollout_batch_size=part.batch)
        calls = {
            "TRL generate": trl_generate(policy, part),
            "plain": lambda part=part: sample(policy, LocalSampler(), request(part, mixed=False)),
            "mixed, K = 8": lambda part=part, sampler=sampler: sample(policy, sampler, request(part, mixed=True)),
        }
        results = in_turn(calls, 1, args.device)
        row = {"tokens": tokens}
        row |= {f"{name} (us/token)": 1e6 * results[name][0] / (part.batch * tokens) for name in calls}
        rows.append(row)
    show(console, f"cost per token against the length, {min(args.batch, 16)} rows", rows)
    return rows


def show(console: Console, title: str, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column != "arm" else "left")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(f"{cell:,.3g}" if isinstance(cell, float) and cell < 1000 else _cell(cell) for cell in cells))
    console.print(table)


def _cell(value) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def main() -> None:
    args, console = parse_args(), Console(width=140)
    policy = make_policy(args)
    device = device_name(args.device != "cpu")
    size = policy.num_parameters() / 1e6
    console.print(
        f"{device}, torch {torch.__version__}; {size:.1f}M parameters, vocabulary "
        f"{args.vocab:,}, {args.dtype}, {args.batch} rows x {args.tokens} tokens"
    )
    results = {"device": device, "arguments": vars(args), "parameters": policy.num_parameters()}
    results["mixed"] = {str(a): compare_mixed(policy, args, a, console) for a in args.acceptance}
    results["lengths"] = compare_lengths(policy, args, console) if args.lengths else []
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
