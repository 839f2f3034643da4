r"""
When the rule of `alpha_schedule: adaptive` withdraws guidance, on simulated rewards of policies that do not change.

    python benchmarks/withdrawal_rule.py

Each prompt of a batch has 4 on-policy and 4 mixed rows, which succeed with given probabilities. The fields are
MentorGRPOConfig's defaults, without probes. A row of the table says for each number of prompts a batch which share of
the runs had lost its guidance after --batches batches, and the median batch at which it did.
"""

import argparse
import statistics

import torch

from mentor_trl import MentorGRPOConfig
from mentor_trl.algorithms.mentor import withdrawal_of


# Probabilities of an on-policy and a mixed row: of all prompts, or of two kinds of prompts
CASES = {
    "level, .9": [(0.9, 0.9)],
    "level, .5": [(0.5, 0.5)],
    "level, .02": [(0.02, 0.02)],
    "worse, .3 and .2": [(0.3, 0.2)],
    "a little better, .88 and .92": [(0.88, 0.92)],
    "better, .5 and .6": [(0.5, 0.6)],
    "sparse, .02 and .05": [(0.02, 0.05)],
    "sparse, .01 and .02": [(0.01, 0.02)],
    "nothing yet, 0 and 0": [(0.0, 0.0)],
    "half solved, the others 0 and .3": [(1.0, 1.0), (0.0, 0.3)],
}


def end(
    config: MentorGRPOConfig, prompts: int, kinds: list[tuple[float, float]], batches: int, seed: int
) -> int | None:
    """Batch with which guidance ended."""
    generator = torch.Generator().manual_seed(seed)
    withdrawal = withdrawal_of(config)
    mixed_N = torch.arange(8 * prompts) % 8 >= 4
    chances = torch.tensor(kinds)
    for batch in range(1, batches + 1):
        kind_G = torch.randint(len(kinds), (prompts,), generator=generator)
        chance_N = chances[kind_G.repeat_interleave(8), mixed_N.long()]
        withdrawal.observe(torch.bernoulli(chance_N, generator=generator), mixed_N, 8)
        if withdrawal.withdrawn:
            return batch
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16, 32, 128], help="prompts of a batch")
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    config = MentorGRPOConfig("unused", use_cpu=True, bf16=False, guidance_probe_every=0, report_to="none")
    print(f"| on-policy and mixed | {' | '.join(f'{prompts} prompts' for prompts in args.prompts)} |")
    print(f"| --- |{' ---: |' * len(args.prompts)}")
    for name, kinds in CASES.items():
        cells = []
        for prompts in args.prompts:
            ends = [end(config, prompts, kinds, args.batches, seed) for seed in range(args.runs)]
            known = [batch for batch in ends if batch is not None]
            cells.append(f"{len(known) / args.runs:.2f}" + (f" ({statistics.median(known):.0f})" if known else ""))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
