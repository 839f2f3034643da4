r"""
Where the expert speaks: branch points and replaced tokens by branch rule, and how uncertain the policy is there.

    python -m benchmarks.study.prepare real --seed 1 --folder outputs/study/prepared/real-seed1 --model MODEL
    python benchmarks/branch_points.py --folder outputs/study/prepared/real-seed1
    python benchmarks/branch_points.py --policy POLICY --expert EXPERT --dataset openai/gsm8k --prompt_column question

gamma of each rule is the quantile of the entropies of one plain rollout of each prompt, as in training, and at least
.1 nats. A prompt of a Hub dataset or of a JSONL file is a text, which is one turn of a chat where the tokenizer has a
template and --folder is not given.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mentor_trl import LocalSampler, MixedRequest
from mentor_trl.objective import sentence_endings
from mentor_trl.rollout.types import MixedRollout


# Rule, quantile of the entropies or gamma in nats, share, span
RULES = {
    "entropy": ("entropy", 0.95, None, 0.0, 1),
    "entropy, quantile .99": ("entropy", 0.99, None, 0.0, 1),
    "entropy, gamma 6 nats": ("entropy", None, 6.0, 0.0, 1),
    "threshold": ("threshold", 0.95, None, 0.0, 1),
    "threshold, quantile .8": ("threshold", 0.8, None, 0.0, 1),
    "sentence, 4 tokens": ("sentence", 0.95, None, 1.0, 4),
    "random, share .1": ("random", 0.95, None, 0.1, 1),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="what benchmarks.study.prepare has written")
    parser.add_argument("--expert_name", default="strong", help="which expert of --folder")
    parser.add_argument("--policy", help="Hub id or folder")
    parser.add_argument("--expert", help="Hub id or folder")
    parser.add_argument("--dataset", help="Hub id or JSONL file of the prompts")
    parser.add_argument("--config", help="configuration of the Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--limit", type=int, default=64, help="prompts")
    parser.add_argument("--tokens", type=int, default=96, help="longest reply")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.folder is not None:
        args.policy = args.policy or str(args.folder / "models" / "policy")
        args.expert = args.expert or str(args.folder / "models" / f"expert_{args.expert_name}")
        args.dataset = args.dataset or str(args.folder / "data" / "test.jsonl")
    for name in ("policy", "expert", "dataset"):
        if getattr(args, name) is None:
            parser.error(f"give --folder or --{name}")
    return args


def read_prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts."""
    rows = Dataset.from_json(args.dataset) if Path(args.dataset).is_file() else None
    rows = rows if rows is not None else load_dataset(args.dataset, args.config, split=args.split)
    texts = rows[args.prompt_column][: args.limit]
    if args.folder is None and tokenizer.chat_template is not None:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=tokenizer.chat_template is None).input_ids


def gamma_of(plain: MixedRollout, quantile: float | None, gamma: float | None) -> float:
    if gamma is not None:
        return gamma
    return max(torch.quantile(plain.entropies[plain.mask].double(), quantile).item(), 0.1)


def figures(rollout: MixedRollout) -> list[float]:
    """Share of branch points and of replaced tokens, entropies (nats) at branch points and elsewhere, and tokens."""
    mask, branch = rollout.mask, rollout.branch
    tokens = mask.sum().item()
    here, elsewhere = rollout.entropies[branch], rollout.entropies[mask & ~branch]
    shares = [branch.sum().item() / tokens, rollout.replaced.sum().item() / tokens]
    return [*shares, here.mean().item(), here.median().item() if len(here) else torch.nan, elsewhere.mean().item()]


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    options = {"dtype": getattr(torch, args.dtype)}
    policy, expert = (
        AutoModelForCausalLM.from_pretrained(name, **options).to(args.device).eval()
        for name in (args.policy, args.expert)
    )
    prompts = read_prompts(args, tokenizer)
    sampler = LocalSampler(expert, num_tokens=len(tokenizer))
    stops = (tokenizer.eos_token_id,)

    def sample(gamma: float, rule: str = "entropy", share: float = 0.0, span: int = 1) -> MixedRollout:
        endings = tuple(sentence_endings(tokenizer)) if rule == "sentence" else ()
        more = {"temperature": args.temperature, "branch_rule": rule, "share": share, "span": span}
        request = MixedRequest(prompts, [gamma] * len(prompts), args.tokens, stops, sentence_ids=endings, **more)
        with sampler.session(policy) as session:
            return session.sample(request)

    plain = sample(float("inf"))
    entropies = plain.entropies[plain.mask]
    nats = f"entropy {entropies.mean():.2f} nats on average, median {entropies.median():.2f}"
    print(f"{len(prompts)} prompts, {len(entropies):,} plain tokens, {nats}\n")
    print("| rule | gamma | branch points | replaced | entropy there | its median | entropy elsewhere |")
    print(f"| --- |{' ---: |' * 6}")
    for name, (rule, quantile, fixed, share, span) in RULES.items():
        gamma = gamma_of(plain, quantile, fixed)
        values = figures(sample(gamma, rule, share, span))
        branch, replaced, *nats = values
        cells = [f"{gamma:.2f}", f"{branch:.1%}", f"{replaced:.1%}", *(f"{value:.2f}" for value in nats)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
