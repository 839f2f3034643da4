"""Evaluation on the sets of the MENTOR paper: lm-eval runs them, this package grades, estimates and reports."""

from mentor_trl.data.problems import TEST_SETS


TASKS: dict[str, str] = {name: test_set.title for name, test_set in TEST_SETS.items() if test_set.title}
"""Names of the sets on the command line and in tables; all but the last are the paper's nine."""

PAPER_TASKS: tuple[str, ...] = tuple(name for name in TASKS if name != "gsm8k")
"""The nine sets whose average the paper reports."""
