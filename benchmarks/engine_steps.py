"""Whole training steps with long-tailed lengths, all rows of a batch at once against mixed rows after the others."""

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from datasets import Dataset
from training_step import Turns, even_share
from transformers import AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from common import Server, markdown_table, random_prompts, working
from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer


STEP_ENGINES = ("in process", "stock servers")
SOURCES = ("current", "previous")


def settings_of(engine: str, source: str, args: Namespace, servers: dict[str, Server]) -> dict[str, Any]:
    settings = {
        "per_device_train_batch_size": args.step_rows // args.accumulate,
        "gradient_accumulation_steps": args.accumulate,
        "num_generations": args.generations,
        "num_mixed_generations": args.generations // 2,
        "max_completion_length": args.step_tokens,
        "max_steps": args.warmup + args.steps,
        "learning_rate": 0.0,  # lengths stay as long-tailed as they are
        "entropy_threshold_from": source,
        "guide_prompts": "all",
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
    if engine == STEP_ENGINES[1]:
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


def measure_steps(
    args: Namespace, folders: dict[str, str], servers: dict[str, Server], say: Callable[[dict], None]
) -> list[dict[str, Any]]:
    """The counted steps of each engine with each source of gamma, in turns; `say` gets each as it comes."""
    arms = [(engine, source) for engine in args.step_engine for source in SOURCES]
    found = []
    with ExitStack() as stack:
        start = lambda arm: working(" ".join(arm), work, settings_of(*arm, args, servers), args, folders)
        workers = {arm: stack.enter_context(start(arm)) for arm in arms}
        for turn in range(args.warmup + args.steps):
            for arm in arms if turn % 2 else arms[::-1]:
                before = sum(server.cpu_seconds() for server in servers.values())
                step = workers[arm].ask("step")
                step["cpu"] += sum(server.cpu_seconds() for server in servers.values()) - before
                if turn >= args.warmup:
                    found.append({"engine": arm[0], "threshold_from": arm[1], "round": turn - args.warmup, **step})
                    say(found[-1])
    return found


def summarize_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each engine, and the ratio of one pass to two in the same round."""
    rows = []
    for engine in dict.fromkeys(step["engine"] for step in steps):
        two, one = (
            [step for step in steps if (step["engine"], step["threshold_from"]) == (engine, source)]
            for source in SOURCES
        )
        ratios = [first["seconds"] / second["seconds"] for first, second in zip(one, two)]
        sums = {
            part: [sum(step[part] for step in own) for own in (two, one)] for part in ("seconds", "sampling", "cpu")
        }
        row = {
            "engine": engine,
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "ratio_of_sums": sums["seconds"][1] / sums["seconds"][0],
            "sampling_ratio": sums["sampling"][1] / sums["sampling"][0],
            "cpu_ratio": sums["cpu"][1] / sums["cpu"][0],
            "sampling_share": sums["sampling"][0] / sums["seconds"][0],
        }
        for name, own in (("two", two), ("one", one)):
            row[f"{name}_seconds"] = statistics.median(step["seconds"] for step in own)
            row[f"{name}_length"] = statistics.fmean(step["logged"]["completions/mean_length"] for step in own)
            row[f"{name}_clipped"] = statistics.fmean(step["logged"]["completions/clipped_ratio"] for step in own)
        rows.append(row)
    return rows


def steps_table(rows: list[dict[str, Any]]) -> str:
    headings = [
        "engine",
        "two passes, s",
        "one pass, s",
        "one / two",
        "least-most",
        "of the sums",
        "sampling, of sums",
        "CPU, of sums",
    ]
    headings += ["sampling's share, two passes", "mean lengths, two and one", "cut off at the limit"]
    lines = []
    for row in rows:
        cells = [row["engine"], f"{row['two_seconds']:.2f}", f"{row['one_seconds']:.2f}", f"{row['ratio']:.2f}"]
        cells += ["{:.2f}-{:.2f}".format(*row["ratio_spread"]), f"{row['ratio_of_sums']:.2f}"]
        cells += [f"{row[name]:.2f}" for name in ("sampling_ratio", "cpu_ratio")]
        cells.append(f"{row['sampling_share']:.0%}")
        cells += [f"{row['two_length']:.0f}, {row['one_length']:.0f}"]
        cells += [f"{row['two_clipped']:.0%}, {row['one_clipped']:.0%}"]
        lines.append(cells)
    return markdown_table(headings, lines)
