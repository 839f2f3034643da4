"""
What the processor that ends requests at branch points costs: CPU time of an engine in this process, with and without
it, taken in turns.

    python benchmarks/processor_cost.py --rows 64 --vocab 32000
    python benchmarks/processor_cost.py --rows 256 --hidden 2048 --layers 36 --vocab 151936 --dtype bfloat16

Rows of the plain policy (gamma = inf) pay for the mask alone. Rows with gamma never branch here, so that all arms
sample the same number of tokens.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def arms() -> dict[str, tuple[bool, dict[str, Any]]]:
    """For each arm, whether its engine has the processor, and its parameters but for seeds."""
    from mentor_trl.vllm_server.options import GAMMA, RULE, SHARE

    entries = lambda gamma, rule: {"extra_args": {GAMMA: gamma, RULE: rule, SHARE: "0"}}
    return {
        "plain rows, no processor": (False, {}),
        "plain rows": (True, {}),
        "rule random": (True, entries("1", "random")),
        "rule sentence": (True, entries("1", "sentence")),
        "rule entropy": (True, entries("1e9", "entropy")),
    }


def processor_cost(
    policy: str, rows: int, tokens: int, prompt: int, vocab: int, repeats: int = 9, seeds: bool = False, **engine: Any
) -> list[dict[str, Any]]:
    """
    Median CPU and wall seconds of each arm, and the median of its ratios to the first arm of the same round. A round
    runs all arms, in changing order.
    """
    import torch

    from mentor_trl.vllm_server.options import SEED, TOKENS, engine_environment, policy_engine_options

    cpu = not torch.cuda.is_available()
    os.environ.update(engine_environment(cpu))
    from vllm import LLM, SamplingParams

    options = policy_engine_options(policy, cpu=cpu) | {
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        **engine,
    }
    table = {"num_tokens": vocab - 8, "branch_id": vocab - 1, "sentence_ids": list(range(0, vocab, 9))}
    plain = {name: value for name, value in options.items() if name != "logits_processors"}
    engines = {True: LLM(**options, additional_config={TOKENS: table}), False: LLM(**plain)}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocab - 8, (rows, prompt), generator=generator).tolist()
    prompts = [{"prompt_token_ids": ids} for ids in prompts]

    def run(name: str) -> tuple[float, float]:
        processor, given = arms()[name]
        params = []
        for row in range(rows):
            own = {"extra_args": {**given["extra_args"], SEED: str(row)}} if given else {}
            own |= {"seed": row} if seeds else {}
            params.append(SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0, **own))
        started = time.process_time(), time.perf_counter()
        engines[processor].generate(prompts, params, use_tqdm=False)
        return time.process_time() - started[0], time.perf_counter() - started[1]

    names = list(arms())
    for name in names:
        run(name)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            found[name].append(run(name))
    first = found[names[0]]
    return [
        {
            "arm": name,
            "cpu_seconds": statistics.median(cpu for cpu, _ in times),
            "seconds": statistics.median(wall for _, wall in times),
            "cpu_ratio": statistics.median(own[0] / other[0] for own, other in zip(times, first)),
            "ratio": statistics.median(own[1] / other[1] for own, other in zip(times, first)),
        }
        for name, times in found.items()
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows at once (64)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each row (64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (32)")
    parser.add_argument("--hidden", type=int, default=128, help="size of the model's hidden states (128)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (2)")
    parser.add_argument("--vocab", type=int, default=32000, help="size of the vocabulary (32000)")
    parser.add_argument("--dtype", default="float32", help="data type of the model (float32)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (9)")
    parser.add_argument("--seeds", action="store_true", help="give every request a seed")
    parser.add_argument("--memory", type=float, default=0.3, help="share of the device's memory for each engine (0.3)")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch

    from common import device_name, random_policy

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        random_policy(args.hidden, args.layers, args.vocab, args.dtype, "cuda" if cuda else "cpu").save_pretrained(
            folder
        )
        torch.accelerator.memory.empty_cache() if cuda else None
        engine = {"dtype": args.dtype, "max_model_len": args.prompt + args.tokens, "max_num_seqs": args.rows}
        engine |= {"gpu_memory_utilization": args.memory} | ({} if cuda else {"kv_cache_memory_bytes": 2**28})
        results = processor_cost(
            folder, args.rows, args.tokens, args.prompt, args.vocab, args.repeats, args.seeds, **engine
        )
    print(f"{device_name(cuda)}, {args.rows} rows of {args.tokens} tokens, vocabulary of {args.vocab}")
    for row in results:
        print(f"{row['arm']:28} CPU {row['cpu_seconds']:.3f} s ({row['cpu_ratio']:.3f}), wall {row['ratio']:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
