"""Whole training steps with long-tailed lengths, all rows of a batch at once against mixed rows after the others."""

import statistics
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from datasets import Dataset
from training_step import Turns, even_share
from transformers import AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from common import Server, random_prompts, working
from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer


SOURCES = ("current", "previous")


def settings_of(engine: str, source: str, args: Namespace, servers: dict[str, Server]) -> dict[str, Any]:
    settings = {
        "per_device_train_batch_size": args.step_rows,
        "num_generations": args.generations,
        "num_mixed_generations": args.generations // 2,
        "max_completion_length": args.step_tokens,
        "max_steps": args.warmup + args.steps,
        "learning_rate": 0.0,  # lengths stay as long-tailed as they are
        "entropy_threshold_from": source,
        "branch_rule": "random",
        "branch_share": args.step_share,
        "alpha_schedule": "constant",
        "rollout_batch_size": args.step_rows,
        "draft_length": args.draft_length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": args.dtype},
    }
    if engine == "stock servers":
        settings |= {"use_vllm": True, "vllm_mode": "server", "vllm_weight_sync": "folder"}
        settings |= {"vllm_server_base_url": servers["policy"].url, "expert_base_url": servers["expert"].url}
    return settings


def work(settings: dict[str, Any], args: Namespace, folders: dict[str, str], connection) -> None:
    """A trainer that waits for its turn before each step."""
    tokenizer = AutoTokenizer.from_pretrained(folders["policy"])
    count = settings["max_steps"] * args.step_rows // args.generations
    prompts = tokenizer.batch_decode(random_prompts(count, args.prompt, args.vocab))
    kwargs = {} if settings.get("expert_base_url") else {"expert": folders["expert"]}
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = MentorGRPOTrainer(
            folders["policy"],
            even_share,
            MentorGRPOConfig(output_dir=output_dir, **settings),
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turns(trainer, connection, Namespace(device=args.device, quantile=0.0)))
        connection.send("ready")
        trainer.train()


def measure_steps(args: Namespace, folders: dict[str, str], servers: dict[str, Server]) -> list[dict[str, Any]]:
    """The counted steps of each engine with each source of gamma, in turns; the first of a round changes."""
    engines = ["in process", *(["stock servers"] if servers else [])]
    arms = [(engine, source) for engine in engines for source in SOURCES]
    found = []
    with ExitStack() as stack:
        start = lambda arm: working(" ".join(arm), work, settings_of(*arm, args, servers), args, folders)
        workers = {arm: stack.enter_context(start(arm)) for arm in arms}
        for turn in range(args.warmup + args.steps):
            for arm in arms if turn % 2 else arms[::-1]:
                step = workers[arm].ask("step")
                if turn >= args.warmup:
                    found.append({"engine": arm[0], "threshold_from": arm[1], "round": turn - args.warmup, **step})
    return found


def summarize_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians, and the ratio of one pass to two in the same round."""
    rows = []
    for engine in dict.fromkeys(step["engine"] for step in steps):
        own = {source: [s for s in steps if (s["engine"], s["threshold_from"]) == (engine, source)] for source in SOURCES}
        two, one = ([step["seconds"] for step in own[source]] for source in SOURCES)
        ratios = [first / second for first, second in zip(one, two)]
        median = lambda name, source: statistics.median(step[name] for step in own[source])
        logged = lambda name: statistics.fmean(step["logged"][name] for part in own.values() for step in part)
        rows.append(
            {
                "engine": engine,
                "two_passes": statistics.median(two),
                "one_pass": statistics.median(one),
                "ratio": statistics.median(ratios),
                "ratio_of_sums": sum(one) / sum(two),
                "ratio_spread": [min(ratios), max(ratios)],
                "sampling_share": median("sampling", "current") / statistics.median(two),
                "sampling_ratio": median("sampling", "previous") / median("sampling", "current"),
                "mean_length": logged("completions/mean_length"),
                "clipped": logged("completions/clipped_ratio"),
                "mean_lengths": {
                    source: statistics.fmean(step["logged"]["completions/mean_length"] for step in own[source])
                    for source in SOURCES
                },
            }
        )
    return rows


def steps_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| engine | two passes, s | one pass, s | one / two | least-most | of the sums | sampling alone | mean length | "
        "cut off at the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["engine"], f"{row['two_passes']:.2f}", f"{row['one_pass']:.2f}", f"{row['ratio']:.2f}"]
        cells += ["{:.2f}-{:.2f}".format(*row["ratio_spread"]), f"{row['ratio_of_sums']:.2f}"]
        cells += [f"{row['sampling_ratio']:.2f}", f"{row['mean_length']:.0f}", f"{row['clipped']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
