import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import make_letter_tokenizer
from mentor_trl.analysis.rendering import excerpt, mark, print_rollout, to_html, visible
from mentor_trl.errors import SetupError
from mentor_trl.rollout import MixedRollout
from mentor_trl.training.batch import Part, RolloutBatch
from mentor_trl.training.rollout_log import (
    RolloutRecord,
    choose_rows,
    collect_records,
    draw_rows,
    read_records,
    save_records,
    token_texts,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as byte-level BPE has it for rare characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def make_rollout(ids: list[list[int]], branch: list[list[int]], replaced: list[list[int]]) -> MixedRollout:
    longest = max(map(len, ids))
    pad = lambda rows, fill: torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
    number = lambda value: pad([[value] * len(row) for row in ids], math.nan)
    branch_B_T = pad(branch, 0).bool()
    expert = torch.where(branch_B_T, math.log(0.25), math.nan)
    marks = {"branch": branch_B_T, "replaced": pad(replaced, 0).bool()}
    numbers = {"entropies": number(0.5), "weights": number(0.25), "logps": number(math.log(0.5))}
    return MixedRollout(ids, **numbers, expert_logps=expert, mixed_logps=expert, **marks)


def make_record(tokens: list[str], branch: list[int] = (), replaced: list[int] = ()) -> RolloutRecord:
    count = len(tokens)
    return RolloutRecord(
        step=3,
        row=0,
        source="mixed",
        prompt="p <b>&amp;</b>\nq",
        reward=1.0,
        advantage=0.5,
        gamma=1.5,
        alpha=0.9,
        token_ids=list(range(count)),
        tokens=tokens,
        entropies=[0.75] * count,
        weights=[0.5] * count,
        logps=[math.log(0.125)] * count,
        expert_logps=[math.log(0.5) if i in branch else None for i in range(count)],
        rho=[0.7] * count,
        branch=[i in branch for i in range(count)],
        replaced=[i in replaced for i in range(count)],
    )


@pytest.mark.parametrize("text", ["plain text", "naïve 🙂🙂 ∑", "日本語\nx", ""])
def test_texts_of_tokens_join_to_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == text


def test_text_of_a_broken_character():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🙂b")["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert texts == ["a", "", "", "", "🙂", "b"]
    cut = ids[:3]
    assert "".join(token_texts(cut, tokenizer)) == tokenizer.decode(cut)


def test_records_of_a_batch_and_back(tmp_path):
    tokenizer = make_letter_tokenizer(".abcdefg")
    on_policy = make_rollout([[1, 2], [3]], [[0, 0], [0]], [[0, 0], [0]])
    mixed = make_rollout([[4, 5, 0], [6]], [[0, 1, 0], [1]], [[0, 1, 0], [0]])
    parts = (Part("on_policy", [0, 2], on_policy), Part("mixed", [1, 3], mixed))
    sources = ("on_policy", "mixed")
    records = collect_records(
        RolloutBatch(sources, torch.tensor([0, 1, 0, 1]), alpha=0.75, gamma=1.5, parts=parts),
        step=7,
        prompts=["w", "x", "y", [{"role": "user", "content": "z"}]],
        rewards=[0.0, 1.0, math.nan, 0.5],
        advantages=[-1.0, 2.0, 0.0, 0.0],
        weights_B_T=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.25, 1.0, 1.0]]),
        tokenizer=tokenizer,
    )
    assert [record.source for record in records] == ["on_policy", "mixed", "on_policy", "mixed"]
    one = records[1]
    assert (one.prompt, one.reward, one.advantage, one.gamma) == ("x", 1.0, 2.0, 1.5)
    assert one.token_ids == [4, 5, 0] and one.rho == [1.0, 0.5, 1.0]
    assert one.branch == one.replaced == [False, True, False]
    assert one.expert_logps[0] is None and one.expert_logps[1] == pytest.approx(math.log(0.25))
    assert records[0].gamma is None and records[2].reward is None
    assert records[3].prompt == "[user] z" and records[3].rho == [0.25]

    file = save_records(tmp_path, records)
    assert file == tmp_path / "rollouts" / "rollouts_00007.parquet" and len(list(file.parent.iterdir())) == 1
    for read, record in zip(read_records(tmp_path), records, strict=True):
        for name, value in vars(record).items():
            assert getattr(read, name) == (value if name in TEXTS_AND_IDS else pytest.approx(value)), name


TEXTS_AND_IDS = ("source", "prompt", "tokens", "token_ids", "branch", "replaced")


def test_choice_of_records_and_errors(tmp_path):
    save_records(tmp_path, [make_record(["a"])])
    records = [replace(make_record(["a"]), source="on_policy"), replace(make_record(["b"]), row=4)]
    assert choose_rows(records) == [records[1]] and choose_rows(records[:1]) == records[:1]
    assert choose_rows(records, [4, 0]) == records[::-1]
    with pytest.raises(SetupError, match="row 2; it has"):
        choose_rows(records, [2])
    with pytest.raises(SetupError, match="step 8. It has those of 3"):
        read_records(tmp_path, 8)
    with pytest.raises(SetupError, match="log_rollout_records"):
        read_records(tmp_path / "rollouts")


class Page(HTMLParser):
    """Texts of the tokens with their classes and titles; counts elements that only unescaped text could make."""

    def __init__(self, page: str):
        super().__init__()
        self.tokens, self.foreign, self._open = [], 0, None
        self.feed(page.split("Completion</h2>")[1])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.foreign += tag in ("script", "b", "img")
        if tag == "span":
            self._open = [attributes["class"], attributes["title"], ""]
            self.tokens.append(self._open)

    def handle_endtag(self, tag):
        self._open = None if tag == "span" else self._open

    def handle_data(self, data):
        if self._open:
            self._open[2] += data


def test_page_escapes_and_marks():
    tokens = ["<script>alert('x')</script>", "</pre>&amp;", '" onmouseover="x', "\n", ""]
    record = make_record(tokens, branch=[1, 2, 3, 4], replaced=[2])
    html = to_html([record], title="<i>")
    page = Page(html)
    assert page.foreign == 0 and "<i>" not in html and "&lt;i&gt;" in html
    assert "p &lt;b&gt;&amp;amp;&lt;/b&gt;\nq" in html
    assert [text for _, _, text in page.tokens] == [*tokens[:3], "↵\n", "⟨4⟩"]
    assert [kind for kind, _, _ in page.tokens] == ["t", "t agreed", "t replaced", "t agreed", "t agreed"]
    title = page.tokens[2][1]
    for part in ("H = 0.75 nats", "w = 0.5", "p = 0.125", "s = 0.5", "rho = 0.7", "replaced the draft"):
        assert part in title
    assert "s =" not in page.tokens[0][1] and not re.search(r"(src|href)=", html)


def print_to_text(record: RolloutRecord, **options) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    print_rollout(record, console)
    return console.file.getvalue()


def test_terminal_without_colour_has_brackets():
    text = print_to_text(make_record(["so", " wait", " 2", "[red]"], branch=[1, 2], replaced=[2]))
    assert "so ‹wait› «2»[red]" in text
    assert "4 tokens · 2 branch points (50.0%) · 1 replaced (25.0%)" in text and "\x1b" not in text


def test_terminal_with_colour_has_styles():
    record = make_record(["so", " wait", " 2"], branch=[1, 2], replaced=[2])
    text = print_to_text(record, force_terminal=True, color_system="truecolor")
    assert "\x1b[1;4;" in text and "‹" not in text
    assert [mark(record, position) for position in range(3)] == [None, "agreed", "replaced"]


def test_control_characters_are_shown():
    assert visible("\x1b[2J\x7f\u202e\ud800\n\ta") == "␛[2J␡\\u202e\\ud800\n\ta"
    assert "\x1b" not in print_to_text(make_record(["\x1b[31m"], branch=[0]))


@pytest.mark.parametrize("width", [40, 80, 160])
def test_an_excerpt_fits_any_width(width):
    words = [f" w{i}" for i in range(400)]
    record = make_record([*words, "\x1b[31m", "\n"], branch=[1, 2, 399], replaced=[2])
    record = replace(record, prompt="start " * 200 + "end")
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(excerpt(record))
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= width and line == line.rstrip() for line in lines) and len(lines) < 40
    text = " ".join(" ".join(lines).split())
    assert "rollout step 3, mixed, reward 1, advantage +0.500, 402 tokens, 3 by the expert (0.7%), 1 replaced" in text
    assert "the expert ‹agreed› «replaced the draft»" in text and "completion w0 ‹w1› «w2» w3" in text
    assert "‹w399›" in text and "\x1b" not in text and text.count(" more lines ...") == (1 if width == 160 else 2)
    assert re.search(r"prompt start .* start end( |$)", text)

    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system="256").print(excerpt(record))
    assert "‹" not in stream.getvalue() and "\x1b[1;4;" in stream.getvalue()


def test_an_excerpt_of_a_row_without_records():
    batch = RolloutBatch(("on_policy",), torch.tensor([0, 0]), completion_ids=[[1, 2], [3]])
    given = {"step": 1, "prompts": ["x", "y"], "rewards": [1.0, math.nan], "advantages": [0.5, 0.0]}
    given |= {"weights_B_T": None, "tokenizer": make_letter_tokenizer(".abc")}
    assert collect_records(batch, **given) == []
    records = collect_records(batch, **given, unrecorded=True)
    assert [excerpt(record).facts[1:] for record in records] == [
        ["on_policy", "reward 1", "advantage +0.500", "2 tokens"],
        ["on_policy", "reward undefined", "advantage +0.000", "1 tokens"],
    ]
    assert excerpt(records[0]).pieces == [("a", None), (" b", None)]


def test_rows_are_drawn_of_each_source_in_turn():
    sources = ["on_policy"] * 6 + ["mixed"] * 2
    drawn = [draw_rows(sources, 3, seed) for seed in range(200)]
    assert all(len(set(rows)) == 3 and len({sources[row] for row in rows[:2]}) == 2 for rows in drawn)
    assert {rows[0] for rows in drawn} == set(range(8)) and drawn[0] == draw_rows(sources, 3, 0)
    assert len(draw_rows(sources, 99, 0)) == 8 and draw_rows(sources, 0, 0) == draw_rows([], 1, 0) == []
