"""Evaluation on the sets of the MENTOR paper: lm-eval runs them, this package grades, estimates and reports."""

TASKS: dict[str, str] = {
    "math500": "MATH500",
    "aime24": "AIME24",
    "aime25": "AIME25",
    "amc23": "AMC23",
    "minerva": "Minerva",
    "olympiadbench": "OlympiadBench",
    "gpqa_diamond": "GPQA-diamond",
    "arc_challenge": "ARC-challenge",
    "mmlu_pro": "MMLU-Pro",
    "gsm8k": "GSM8K",
}
"""Names of the sets on the command line and in tables; all but the last are the paper's nine."""

PAPER_TASKS: tuple[str, ...] = tuple(name for name in TASKS if name != "gsm8k")
"""The nine sets whose average the paper reports."""
