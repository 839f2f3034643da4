"""Signs of life while a rollout batch is sampled."""

import sys
import time

from tqdm.auto import tqdm


DELAY = 1.0  # seconds before a bar appears
FIRST = 10.0  # seconds before the first line


class SamplingProgress:
    """
    A context manager that is called with rows finished and tokens committed, and shows them: as a bar on a terminal,
    elsewhere (a log file) as a plain line now and then. A batch that is sampled within a second shows nothing.

    Args:
        rows (`int`):
            Rows to sample.
        what (`str`):
            What they are called.
        disable (`bool`, *optional*, defaults to `False`):
            Whether to show nothing.
        interval (`float`, *optional*, defaults to `30.0`):
            Seconds between two lines.
    """

    def __init__(self, rows: int, what: str, disable: bool = False, interval: float = 30.0):
        self.total, self.what, self.interval = rows, what, interval
        self.rows = self.tokens = 0
        on_terminal = sys.stderr.isatty()
        self.lines = not disable and not on_terminal
        self.bar = tqdm(
            total=rows, desc=what, unit="row", leave=False, delay=DELAY, disable=disable or not on_terminal
        )

    def __enter__(self) -> "SamplingProgress":
        self.started = time.monotonic()
        self.said = self.started - self.interval + FIRST
        return self

    def __exit__(self, *failure) -> None:
        self.bar.close()

    def __call__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.bar.set_postfix(tokens=self.tokens, refresh=False)
        self.bar.update(rows)
        now = time.monotonic()
        if self.lines and now - self.said >= self.interval:
            self.said = now
            text = f"{self.what}: {self.rows} of {self.total} rows, {self.tokens} tokens, {now - self.started:.0f} s"
            print(text, file=sys.stderr, flush=True)
