"""What training prints, and the same in a file."""

import io
import json
import logging
import re
import sys

import pytest
from tokenizers import models
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.training import console, step_line
from mentor_trl.training.step_line import COLUMNS, REPEAT, StepLines, evaluation_line, fitting
from trainer_helpers import RecordingTrainer, make_trainer, prompts


# A step of a run that has everything but trajectories
ALL = {
    "mentor/on_policy/reward": 0.25,
    "mentor/mixed/reward": -0.5,
    "mentor/on_policy/rewards/accuracy_reward": 0.125,
    "completions/mean_length": 1234.5,
    "completions/clipped_ratio": 0.0625,
    "entropy": 0.4321,
    "mentor/distillation/reverse_kl": 1.5,
    "mentor/alpha": 0.75,
    "mentor/weight": 0.0675,
    "mentor/replaced_rate": 0.25,
    "reward": -0.125,
    "loss": 0.1,
    "grad_norm": 2.0,
    "learning_rate": 1e-6,
    "num_tokens": 3000,
    "step_time": 2.0,
}
REUSED = {"loss": 0.2, "grad_norm": 2.0, "learning_rate": 1e-6, "entropy": 0.4, "step_time": 1.0}
PLAIN = {name: value for name, value in ALL.items() if not re.search("mixed|alpha|weight|replaced|distil", name)}
NAMES = [column.name for column in COLUMNS]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_line.time, "monotonic", lambda: now[0])
    return now


def cells(line: str) -> list[str]:
    return re.split(r"\s+(?!norm)", line.strip())


def test_columns_of_a_step(clock):
    lines = StepLines()
    lines.begin(10, [{"num_tokens": 1000}, {"eval_reward": 1.0}])
    clock[0] = 30.0
    header, line = lines.step_lines(ALL, 12, 100, 200)
    found = dict(zip(cells(header[-1]), cells(line), strict=True))
    # 2000 tokens in two steps of 2 seconds; 88 steps to go, 15 seconds each
    assert found == {
        "step": "12/100",
        "reward": "0.250",
        "mixed": "-0.500",
        "accuracy": "0.125",
        "length": "1.23k",
        "cut": "6.2%",
        "entropy": "0.432",
        "KL": "1.500",
        "alpha": "0.75",
        "E[w]": "0.068",
        "replaced": "25%",
        "loss": "0.100",
        "grad norm": "2.000",
        "lr": "1.0e-06",
        "tok/s": "500",
        "left": "22:00",
    }
    legend = " ".join(header[:-1])
    assert legend.startswith("Columns: reward (on-policy rollouts), mixed (") and "lr" not in legend


@pytest.mark.parametrize("width", [30, 60, 80, 100, 160])
def test_lines_fit(width, clock):
    lines = StepLines()
    clock[0] = 100.0
    header, line = lines.step_lines(ALL, 1, 50000, width)
    assert all(len(part) <= width for part in [*header, line])
    assert len(header[-1]) == len(line)
    names = cells(header[-1])[1:]
    ranks = {column.name: column.rank for column in COLUMNS}
    left_out = {name for name in NAMES if name not in ("expert", *names)}
    assert max(ranks[name] for name in names) <= min([ranks[name] for name in left_out], default=99)
    assert {"reward", "mixed"} <= set(names) and ("lr" in names) == (width == 160)


def test_columns_come_and_go_with_the_header(clock):
    lines, headers, rows = StepLines(), {}, {}
    for step in range(1, 2 * REPEAT + 2):
        logs = REUSED if step % 2 == 0 else ALL if step < 4 else PLAIN
        header, rows[step] = lines.step_lines(logs, step, 99, 200)
        if header:
            headers[step] = cells(header[-1])
    assert list(headers) == [1, REPEAT + 1, 2 * REPEAT + 1]
    assert "mixed" in headers[1] and "mixed" not in headers[REPEAT + 1] and "cut" in headers[REPEAT + 1]
    # A step that learns from the rollouts of an earlier one, and one after the guidance
    assert dict(zip(headers[1], cells(rows[2])))["reward"] == step_line.NOTHING
    assert dict(zip(headers[1], cells(rows[5])))["mixed"] == step_line.NOTHING
    # Guidance is back
    header, _ = lines.step_lines(ALL, 99, 99, 200)
    assert len(header) == 1 and "mixed" in header[0]
    assert lines.step_lines(ALL, 99, 99, 80)[0] and not lines.step_lines(ALL, 99, 99, 80)[0]


def test_alpha_of_ended_guidance_is_no_column(clock):
    header, _ = StepLines().step_lines({**PLAIN, "mentor/alpha": 0.0}, 1, 9, 200)
    assert "alpha" not in cells(header[-1])
    assert [column.name for column in fitting(COLUMNS[:3], 12, 4)] == ["reward"]


def test_an_evaluation_in_a_line():
    logs = {"eval_loss": 0.1, "eval_reward": 0.5, "eval_rewards/accuracy_reward/mean": 0.25, "eval_entropy": 1.0}
    assert evaluation_line({**logs, "eval_gsm8k_runtime": 61.0}, 7) == (
        "Evaluation on gsm8k at step 7: reward 0.500, accuracy 0.250, entropy 1.000, 01:01"
    )
    assert evaluation_line({**logs, "eval_runtime": 1.0}, 7).startswith("Evaluation at step 7: reward 0.500,")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"reward": 0.0, "mentor/mixed/reward": 0.0, "grad_norm": 0.0}] * 2, "take easier problems"),
        ([{"reward": 1.0, "grad_norm": 0.0}], "Every reward was 1, so nothing was learned: take harder"),
        ([{"reward": 0.0, "grad_norm": 0.0}, {"reward": 0.0, "mentor/mixed/reward": 0.5, "grad_norm": 0.0}], ""),
        ([{"reward": 0.0, "grad_norm": 0.5}], ""),  # by another loss
        ([{"reward": float("nan"), "grad_norm": 0.0}], ""),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_learns_nothing_says_so(steps, said, resumed):
    lines = StepLines()
    if resumed:
        lines.begin(len(steps), steps)
    else:
        for step, logs in enumerate(steps, 1):
            lines.step_lines(logs, step, 10, 80)
    assert said in lines.advice() and bool(said) == bool(lines.advice())


def printed(capsys) -> str:
    out, err = capsys.readouterr()
    assert "\r" not in out + err and "\x1b" not in out + err
    assert not err, err
    return out


@pytest.mark.parametrize("quiet", [True, False])
def test_a_log_file_has_a_line_a_step(quiet, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    settings = {"steps_per_generation": 2, "log_completions": True, "eval_strategy": "steps", "eval_steps": 4}
    settings |= {"max_steps": 4, "per_device_train_batch_size": 4, "trainer_kwargs": {"eval_dataset": prompts(1)}}
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, disable_tqdm=quiet, **settings)
    trainer.train()
    text = printed(capsys)
    assert all(len(line) <= console.FILE_WIDTH and line == line.rstrip() for line in text.splitlines()[1:])
    assert re.findall(r"^ +(\d)/4 ", text, re.M) == list("1234") and text.count("step  reward") == 1
    assert text.startswith(f"Training to step 4. All metrics: {tmp_path}/log.jsonl\nColumns: ")
    assert "Evaluation at step 4: reward " in text and "\nTrained to step 4 in " in text
    # One rollout for each batch that is sampled, and for the evaluation
    rollouts = re.findall(r"^ +rollout (\S+ \d|\S+ at step \d), ", text, re.M)
    assert rollouts == ["step 1", "step 3", "evaluation at step 4"]
    assert "│" not in text and "advantage" in text and ("the expert ‹" in text) == (", mixed, " in text)


def test_the_full_format_and_a_users_own_callback(tmp_path, capsys):
    class Own(ProgressCallback):
        pass

    trainer = make_trainer(tmp_path, log_format="full", max_steps=1, trainer_kwargs={"callbacks": [Own()]})
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Own in kinds and console.LinePrinter in kinds and PrinterCallback not in kinds
    trainer.remove_callback(Own)
    trainer.train()
    _, step, end = printed(capsys).splitlines()
    assert step.startswith("{'loss': '") and "'mentor/gamma': '" in step and end.startswith("{'train_runtime'")


def test_the_log_is_in_a_file_that_a_resumed_run_goes_on_with(tmp_path):
    read = lambda: [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "num_mixed_generations": 0}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    first = trainer.state.log_history
    assert (
        read() == first
        and [entry["step"] for entry in first] == [1, 2, 3, 3]
        and "mentor/on_policy/reward" in first[0]
    )
    trainer = make_trainer(tmp_path, **settings | {"max_steps": 4})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert read() == trainer.state.log_history and read()[:2] == first[:2]
    assert [entry["step"] for entry in read()] == [1, 2, 3, 4, 4]


def test_bars_on_a_terminal_and_lines_above_them(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    screen = Terminal()
    for name, value in {"COLUMNS": "80", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    make_trainer(tmp_path, disable_tqdm=False, log_completions=True, num_completions_to_print=8).train()
    text = screen.getvalue()
    assert "\r100%|" in text and "\x1b[1mstep reward  mixed" in text and "‹" not in text
    words = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [part for line in words.splitlines() for part in line.split("\r")]
    assert max(map(len, lines[1:])) <= 80 and sum(" rollout step" in line for line in lines) == 16


def test_other_first_and_padding_tokens_need_no_warning(tmp_path, caplog):
    model, tokenizer = make_tiny_model(seed=0), make_tiny_tokenizer()
    tokenizer.bos_token = None
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").propagate = True
        trainer = make_trainer(tmp_path, model=model, processing_class=tokenizer, num_mixed_generations=0, max_steps=1)
        trainer.train()
    assert not [record for record in caplog.records if "new PAD/BOS/EOS" in record.message]
    assert trainer.model.config.bos_token_id is None and trainer.model.generation_config.eos_token_id in (2, [2])


@pytest.mark.parametrize(
    ("kind", "forced", "left"), [("BPE", False, False), ("BPE", True, True), ("WordLevel", False, True)]
)
def test_a_clean_up_that_is_not_done_is_not_asked_for(kind, forced, left):
    tokenizer, name = make_tiny_tokenizer(), "clean_up_tokenization_spaces"
    if kind == "BPE":
        tokenizer.backend_tokenizer.model = models.BPE(vocab=tokenizer.get_vocab(), merges=[], unk_token="<unk>")
    setattr(tokenizer, name, True)
    setattr(tokenizer, f"{name}_for_bpe_even_though_it_will_corrupt_output", forced)
    before = tokenizer.decode(list(range(7, 30)))
    console.fit_tokenizer(make_tiny_model(), tokenizer)
    assert tokenizer.clean_up_tokenization_spaces == left and tokenizer.decode(list(range(7, 30))) == before
