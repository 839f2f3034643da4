r"""
When the rule of `alpha_schedule: adaptive` withdraws guidance, on simulated rewards.

    python benchmarks/withdrawal_rule.py
    python benchmarks/withdrawal_rule.py --smoothing 0.9 --patience 5

Each prompt of a batch has 4 on-policy and 4 mixed rows, which succeed with given probabilities. The fields are
MentorGRPOConfig's defaults, without probes. A row of the table says for each number of prompts a batch which share of
the runs had lost its guidance after --batches batches, and the median batch at which it did.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import torch

from mentor_trl import MentorGRPOConfig
from mentor_trl.algorithms.mentor import withdrawal_of


Kinds = list[tuple[float, float]]


def learning(batch: int) -> Kinds:
    """A policy that learns: the difference is above a tenth of its success until batch 35, .22 at the most."""
    on = 1.0 / (1.0 + math.exp(-(batch - 25) / 5))
    return [(on, on + 0.9 * on * (1.0 - on))]


# Probabilities of an on-policy and a mixed row: of all prompts, or of two kinds of prompts; by batch where they change
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
    "learning, less than a tenth better from batch 36": learning,
}


def end(
    config: MentorGRPOConfig, prompts: int, case: Kinds | Callable[[int], Kinds], batches: int, seed: int
) -> int | None:
    """Batch with which guidance ended."""
    generator = torch.Generator().manual_seed(seed)
    withdrawal = withdrawal_of(config)
    mixed_N = torch.arange(8 * prompts) % 8 >= 4
    for batch in range(1, batches + 1):
        kinds = case(batch) if callable(case) else case
        chances = torch.tensor(kinds)
        kind_G = torch.randint(len(kinds), (prompts,), generator=generator)
        chance_N = chances[kind_G.repeat_interleave(8), mixed_N.long()]
        withdrawal.observe(torch.bernoulli(chance_N, generator=generator), mixed_N, 8)
        if withdrawal.withdrawn:
            return batch
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = MentorGRPOConfig.__dataclass_fields__
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16, 32, 128], help="prompts of a batch")
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--smoothing", type=float, default=fields["guidance_smoothing"].default)
    parser.add_argument("--patience", type=int, default=fields["guidance_patience"].default)
    args = parser.parse_args()
    rule = {"guidance_smoothing": args.smoothing, "guidance_patience": args.patience, "guidance_probe_every": 0}
    config = MentorGRPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **rule)
    print(f"| on-policy and mixed | {' | '.join(f'{prompts} prompts' for prompts in args.prompts)} |")
    print(f"| --- |{' ---: |' * len(args.prompts)}")
    for name, case in CASES.items():
        cells = []
        for prompts in args.prompts:
            ends = [end(config, prompts, case, args.batches, seed) for seed in range(args.runs)]
            known = [batch for batch in ends if batch is not None]
            cells.append(f"{len(known) / args.runs:.2f}" + (f" ({statistics.median(known):.0f})" if known else ""))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
