"""Mixed rows for the prompts that need them."""

import pandas as pd
import pytest
import torch

from helpers import make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig
from mentor_trl.config_checks import check_guided_prompts
from trainer_helpers import RecordingTrainer, history, letters_reward, make_trainer, prompts


SETTINGS = {"guide_prompts": "failing", "per_device_train_batch_size": 32, "max_completion_length": 6, "max_steps": 2}
SETTINGS |= {"log_completions": True}


def by_prompt(completions, prompts, log_extra, log_metric, **kwargs) -> list[float]:
    """The last digit of n in the prompt `n+n=`: 0 fails, 1 succeeds, 2 and more succeeds in every second row."""
    digits = [int(prompt.split("+")[0]) % 3 for prompt in prompts]
    log_extra("digit", digits)
    log_metric("rows", len(prompts))
    log_metric("mentor/verifier_failures", len(prompts))
    return [float(digit == 1 or (digit == 2 and i % 2)) for i, digit in enumerate(digits)]


def make(folder, **settings):
    return make_trainer(folder, cls=RecordingTrainer, **{"reward_funcs": by_prompt, **SETTINGS, **settings})


def digits_of(trainer, batch: int) -> list[int]:
    """Of the prompt of each group."""
    tokenizer = trainer.processing_class
    texts = tokenizer.batch_decode(trainer.batches[batch]["prompt_tokens"])
    return [int(text.split("+")[0]) % 3 for text in texts[::8]]


@pytest.mark.parametrize("below, helped", [(None, {0}), (0.6, {0, 2}), (1.0, {0, 2})])
def test_only_failing_prompts_are_guided(below, helped, tmp_path):
    trainer = make(tmp_path, guide_below=below)
    trainer.train()
    log = [entry for entry in history(trainer) if "loss" in entry]
    assert len(trainer.batches) == 2
    for index, (batch, entry) in enumerate(zip(trainer.batches, log)):
        digits = digits_of(trainer, index)
        assert batch["guided"].tolist() == [i >= 4 and digit in helped for digit in digits for i in range(8)]
        places, mixed = 16, batch["guided"].sum().item()
        tokens = batch["completion_mask"].sum(1)[batch["guided"]].sum().item()
        assert entry["mentor/guidance/guided_prompts"] == mixed / places
        assert entry["mentor/guidance/expert_tokens"] == tokens
        if mixed:
            assert entry["mentor/guidance/expert_tokens_saved"] == pytest.approx((places - mixed) * tokens / mixed)
        # two calls of 16 rows: a count, and a mean
        assert entry["mentor/verifier_failures"] == 32.0 and entry["rows"] == 16.0
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert table["digit"].tolist() == [int(prompt.split("+")[0]) % 3 for prompt in table["prompt"]]
    assert table["source"].tolist() == [["on_policy", "mixed"][row] for row in trainer.batches[1]["guided"].long()]
    assert {digit for index in (0, 1) for digit in digits_of(trainer, index)} == {0, 1, 2}


def test_advantages_follow_the_sources(tmp_path):
    """A group without mixed rows has the statistics of all its rows."""
    trainer = make(tmp_path, guide_below=0.6, max_steps=1)
    trainer.train()
    (batch,) = trainer.batches
    for first in range(0, 32, 8):
        rewards, guided = batch["rewards"][first : first + 8], batch["guided"][first : first + 8]
        on = rewards[~guided]
        assert len(on) in (4, 8)
        expected = torch.where(guided, (rewards - on.mean()).clamp(min=0), (rewards - on.mean()) / (on.std() + 1e-4))
        assert batch["row_advantages"][first : first + 8] == pytest.approx(expected.tolist(), abs=1e-5)


def test_with_adaptive_a_random_share_is_compared(tmp_path):
    settings = {"alpha_schedule": "adaptive", "guide_share": 0.5, "max_steps": 4, "guidance_margin": 9.0}
    trainer = make(tmp_path, **settings, guidance_patience=2, guidance_probe_every=1, reward_funcs=early)
    trainer.train()
    groups = [batch["guided"].view(4, 8)[:, 4:].all(1) for batch in trainer.batches]
    # None fails before the withdrawal, and all do in the probes
    assert [group.sum().item() for group in groups] == [2, 2, 2, 2]
    assert not all(torch.equal(groups[0], group) for group in groups[1:])
    log = [entry for entry in history(trainer) if "loss" in entry]
    assert [entry["mentor/guidance/withdrawn"] for entry in log] == [0, 0, 1, 1]
    for batch in trainer.batches[2:]:
        assert (batch["completion_mask"].sum(1) == 0).tolist() == batch["guided"].tolist()


def early(completions, trainer_state, **kwargs) -> list[float]:
    return [float(trainer_state.global_step < 2)] * len(completions)


def test_rewards_are_those_of_their_rows(tmp_path):
    def total(completion_ids, **kwargs):
        return [sum(ids) / 1000 for ids in completion_ids]

    trainer = make(tmp_path, reward_funcs=[total, letters_reward], max_steps=1, guide_below=1.0, reward_range=9.0)
    trainer.train()
    (batch,) = trainer.batches
    ids = [[token for token, kept in zip(*row) if kept] for row in zip(*rows_of(batch))]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    expected = [a + b for a, b in zip(total(ids), letters_reward(texts))]
    assert batch["rewards"].tolist() == pytest.approx(expected) and len(set(expected)) > 20


def rows_of(batch) -> tuple[list, list]:
    return batch["completion_ids"].tolist(), batch["completion_mask"].tolist()


def test_a_failing_prompt_is_not_compared_for_that(tmp_path):
    """Of all groups only the drawn ones count, or the difference would be that of chosen failures."""
    settings = {"alpha_schedule": "adaptive", "guide_share": 0.25, "max_steps": 1, "guide_below": 1.0}
    trainer = make(tmp_path, **settings)
    trainer.train()
    (batch,) = trainer.batches
    gap = trainer.algorithm.guidance.withdrawal.gap
    assert gap.groups == 1.0 and batch["guided"].view(4, 8).any(1).sum() > 1
    trainer.algorithm.guidance.batches = 0
    (drawn,) = trainer.algorithm._compared(4).nonzero().flatten().tolist()
    on, mixed = batch["rewards"].view(4, 2, 4).mean(2)[drawn].tolist()
    assert gap.mean("on") == on and gap.mean("mixed") == mixed


def test_undefined_rewards(tmp_path):
    trainer = make(tmp_path, reward_funcs=lambda completions, **kwargs: [None] * len(completions), max_steps=1)
    with pytest.warns(UserWarning, match="has a reward by"):
        trainer.train()
    (batch,) = trainer.batches
    assert not batch["guided"].any() and batch["rewards"].isnan().all()
    assert history(trainer)[0]["mentor/guidance/expert_tokens_saved"] == 0.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"entropy_threshold_from": "previous"}, "samples all at once. Set it to 'current'"),
        ({"guide_below": 0.0}, "`guide_below` is 0.0; it must be above 0 and at most 1, or unset"),
        ({"guide_share": 0.0}, "above 0 and at most 1"),
        ({"guide_prompts": "x"}, "choose one of 'all', 'failing'"),
    ],
)
def test_what_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{**SETTINGS, **settings})


def test_groups_over_two_processes_are_refused(tmp_path):
    args = make_trainer(tmp_path, **SETTINGS).args
    args.per_device_train_batch_size = 12  # of each process; a single one cannot have such a batch
    with pytest.raises(ValueError, match="whole groups on each process, which has 12 rows.*no multiple of.*=8`"):
        check_guided_prompts(args)


@pytest.mark.parametrize("template", [False, True])
def test_reward_functions_see_what_they_would_see(template, tmp_path):
    """The completions of the first call, and those of the same rows in a batch that is rewarded at once."""
    tokenizer, seen = make_tiny_tokenizer(), []
    conversations = prompts().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if template:
        tokenizer.response_template = {}
        tokenizer.parse_response = lambda ids, prefix, **kwargs: {"role": "assistant", "content": f"{prefix} {ids}"}

    def look(completions, completion_ids, prompts, **kwargs):
        seen.append(sorted(zip(completion_ids, map(str, prompts), map(str, completions))))
        return [0.0] * len(completions)

    settings = {"train_dataset": conversations, "processing_class": tokenizer, "reward_funcs": look, "max_steps": 1}
    for guided in ("failing", "all"):
        make(tmp_path / guided, **settings, guide_prompts=guided).train()
    first, rest, whole = seen
    assert len(first) == len(rest) == 16 and sorted(first + rest) == whole
    assert ("[" in first[0][2].split("content")[1]) is template


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("failing", "current")),
        ({"entropy_threshold_from": "previous"}, ("all", "previous")),
        ({"guide_prompts": "all"}, ("all", "previous")),
        ({"guide_prompts": "all", "entropy_threshold_from": "current"}, ("all", "current")),
        ({"num_mixed_generations": 8}, ("all", "previous")),
        ({"num_mixed_generations": 0}, ("all", "previous")),
        ({"per_device_train_batch_size": 4}, ("all", "previous")),  # half a group on each of two processes
    ],
)
def test_what_is_not_set(settings, expected, monkeypatch):
    monkeypatch.setattr(MentorGRPOConfig, "world_size", property(lambda self: 2))
    given = {"per_device_train_batch_size": 8, "num_generations": 8, "num_mixed_generations": 4, **settings}
    args = MentorGRPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **given)
    assert (args.guide_prompts, args.entropy_threshold_from) == expected
