"""Signs of life while rows are sampled."""

import sys
from functools import partial

import pytest

from mentor_trl.rollout import progress
from mentor_trl.rollout.progress import SamplingProgress
from trainer_helpers import make_trainer


class Terminal:
    """Standard error of a terminal, or of a file."""

    def __init__(self, terminal: bool):
        self.text, self.isatty = "", lambda: terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock, monkeypatch, terminal, **options):
    stream = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with SamplingProgress(4, "Mixed rows", **options) as shown:
        for rows, tokens, seconds in ((1, 10, 12.0), (0, 5, 20.0), (3, 40, 15.0)):
            clock[0] += seconds
            shown(rows, tokens)
    return stream.text


def test_lines_of_a_log_file(clock, monkeypatch):
    lines = "Mixed rows: 1 of 4 rows, 10 tokens, 12 s\nMixed rows: 4 of 4 rows, 55 tokens, 47 s\n"
    assert run(clock, monkeypatch, False) == lines
    assert run(clock, monkeypatch, False, disable=True) == ""


def test_a_bar_on_a_terminal(clock, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0.0, miniters=1))
    text = run(clock, monkeypatch, True)
    assert "Mixed rows" in text and "tokens=55" in text and "4/4" in text and "\r" in text
    assert run(clock, monkeypatch, True, disable=True) == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_trainer_shows_its_rows_unless_it_is_quiet(quiet, tmp_path, monkeypatch):
    made = []

    class Recorded(SamplingProgress):
        def __init__(self, rows, what, disable=False):
            super().__init__(rows, what, disable=True)
            made.append((self, what, disable))

    monkeypatch.setattr("mentor_trl.trainer.SamplingProgress", Recorded)
    trainer = make_trainer(tmp_path, max_steps=1, disable_tqdm=quiet)
    trainer.train()
    assert [(what, shown.total, shown.rows, disable) for shown, what, disable in made] == [
        ("On-policy rows", 4, 4, quiet),
        ("Mixed rows", 4, 4, quiet),
    ]
    assert sum(shown.tokens for shown, _, _ in made) == sum(map(len, trainer.batch.completion_ids))
