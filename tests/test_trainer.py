"""Training with mixed rollouts, end to end on tiny models."""

import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import load_expert
from mentor_trl.rollout.local.sampler import LocalSession
from trainer_helpers import (
    RecordingTrainer,
    advantages_by_hand,
    history,
    letters_reward,
    make_trainer,
    prompts,
    same_weights,
    weights,
)


LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def rng_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def ours(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith("mentor/")}


def test_an_expert_leaves_every_random_state_alone(tmp_path, tiny_expert_dir, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained

    def load_and_draw(*args, **kwargs):
        """As a model does that initializes weights which its checkpoint lacks."""
        random.random(), np.random.rand(), torch.rand(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_draw)
    before = rng_states()
    load_expert(str(tiny_expert_dir))
    assert rng_states() == before

    make_trainer(tmp_path / "a", cls=GRPOTrainer, config=GRPOConfig)
    expected = rng_states()
    torch.rand(3), random.random(), np.random.rand()
    make_trainer(tmp_path / "b", expert_model_name_or_path=str(tiny_expert_dir))
    assert rng_states() == expected


# Mixed rollouts


GUIDED = {"gradient_accumulation_steps": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """Two steps of rollout batches of two prompts each."""
    trainer = make_trainer(tmp_path_factory.mktemp("guided"), cls=RecordingTrainer, **GUIDED)
    start = weights(trainer)
    trainer.train()
    return trainer, start


def test_every_parameter_is_trained(guided):
    trainer, start = guided
    end = weights(trainer)
    assert [name for name in start if torch.equal(start[name], end[name])] == []


def test_the_expert_is_not_trained(guided):
    trainer, _ = guided
    expert = trainer.engine.sampler.expert
    assert same_weights(dict(expert.state_dict()), dict(make_tiny_model(seed=1).state_dict()))
    assert not any(p.requires_grad or p.grad is not None for p in expert.parameters())


def test_mixed_rows_are_the_last_of_each_group(guided):
    for batch in guided[0].batches:
        assert batch["guided"].tolist() == ([False] * 4 + [True] * 4) * 2


def test_records_agree_with_the_models(guided):
    """log p, H and log s of a rollout are those of plain forward passes over the finished sequences."""
    trainer, start = guided
    batch = trainer.batches[0]
    mixed, rollout = batch["guided"], batch["rollout"]
    policy = make_tiny_model(seed=0)
    policy.load_state_dict(start)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[mixed]
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[mixed]
    length = batch["completion_ids"].size(1)
    for model, recorded, where in (
        (policy, rollout.logps, rollout.mask),
        (make_tiny_model(seed=1), rollout.expert_logps, rollout.branch),
    ):
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
        logps = logits[:, -length - 1 : -1].log_softmax(-1)
        picked = logps.gather(2, ids[:, -length:, None]).squeeze(2)[:, : recorded.size(1)]
        assert where.any()
        torch.testing.assert_close(recorded[where], picked[where], atol=1e-4, rtol=1e-4)


CORRECTIONS = {
    "temper": lambda r: min(0.8, r) ** 0.5,
    "clip": lambda r: min(max(r, 0.3), 0.8),
    "mask": lambda r: r if r <= 0.8 else 0.0,
    "saturate": lambda r: r / (r + 0.2),
}


@pytest.mark.parametrize("level", ["conditional", "mixture"])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_advantages_are_those_of_the_rewards_times_the_correction(kind, level, tmp_path):
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        correction=kind,
        correction_level=level,
        correction_cap=0.8,
        correction_floor=0.3 if kind == "clip" else 0.0,
        correction_exponent=0.5,
        correction_constant=0.2,
        gradient_accumulation_steps=2,
        entropy_threshold=7.0,
        max_steps=2,
        expert_decay_steps=4,
    )
    trainer.train()
    for batch in trainer.batches:
        rows = advantages_by_hand(batch["rewards"].tolist(), 8, 4, batch["alpha"])
        assert batch["row_advantages"] == pytest.approx(rows, abs=1e-5)
        rollout, row = batch["rollout"], -1
        for i, mixed in enumerate(batch["guided"].tolist()):
            row += mixed
            for t in range(int(batch["completion_mask"][i].sum())):
                rho = 1.0
                if mixed and level == "mixture":
                    w, p = rollout.weights[row, t].item(), rollout.logps[row, t].exp().item()
                    m = rollout.mixed_logps[row, t].exp().item()
                    if rollout.expert_logps[row, t].isfinite():
                        assert m == pytest.approx(
                            (1 - w) * p + w * rollout.expert_logps[row, t].exp().item(), rel=1e-4
                        )
                    rho = CORRECTIONS[kind](p / m)
                elif mixed and rollout.branch[row, t]:
                    rho = CORRECTIONS[kind]((rollout.logps[row, t] - rollout.expert_logps[row, t]).exp().item())
                assert batch["advantages"][i, t].item() == pytest.approx(rho * rows[i], rel=1e-3, abs=1e-5)
    first = trainer.batches[0]
    assert 0 < first["rollout"].branch.sum() < first["rollout"].mask.sum()
    assert (first["advantages"][first["guided"]] > 0.0).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_reward_scaling_two_functions_and_undefined_rewards(scale, tmp_path):
    """Group 0: some rows undefined; group 1: no on-policy row defined; group 2: one on-policy row defined."""

    def partly(completions, **kwargs):
        undefined = {1, 6, 8, 9, 10, 11, 16, 17, 18}
        return [None if i in undefined else reward for i, reward in enumerate(letters_reward(completions))]

    def length(completion_ids, **kwargs):
        undefined = {1, 8, 9, 10, 11, 16, 17, 18}
        return [None if i in undefined else len(ids) + i / 10 for i, ids in enumerate(completion_ids)]

    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        reward_funcs=[partly, length],
        reward_weights=[2.0, 0.25],
        scale_rewards=scale,
        reward_range=4.0,
        gradient_accumulation_steps=3,
        max_steps=2,
        max_completion_length=5,
    )
    trainer.train()
    for batch in trainer.batches:
        rewards = batch["rewards"].tolist()
        assert [i for i, reward in enumerate(rewards) if math.isnan(reward)] == [1, 8, 9, 10, 11, 16, 17, 18]
        rows = advantages_by_hand(rewards, 8, 4, batch["alpha"], scale, 4.0)
        assert batch["row_advantages"] == pytest.approx(rows, abs=1e-4)
        assert rows[8:16] == [0.0] * 8 and any(rows[:8])
        assert batch["advantages"].isfinite().all()
    entries = [entry for entry in history(trainer) if ours(entry)]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_no_reward_at_all(tmp_path):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, cls=RecordingTrainer, reward_funcs=nothing, weight_decay=0.0)
    start = weights(trainer)
    trainer.train()
    assert all((batch["advantages"] == 0.0).all() for batch in trainer.batches)
    assert same_weights(weights(trainer), start)


def test_rewards_beyond_their_range_are_told_once(tmp_path):
    def large(completions, **kwargs):
        return [3.0 * reward for reward in letters_reward(completions)]

    with pytest.warns(UserWarning, match=r"differ by 3, more than `reward_range=1.0`.*Set `reward_range`") as told:
        make_trainer(tmp_path, reward_funcs=large).train()
    assert sum("reward_range" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize(
    ("settings", "steps_per_batch"),
    [
        ({"gradient_accumulation_steps": 2}, 1),
        ({"steps_per_generation": 2}, 2),  # the paper's: two optimizer steps a rollout batch
        ({"steps_per_generation": 2, "num_iterations": 2}, 4),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, 2),
        ({"steps_per_generation": 1, "num_iterations": 3}, 3),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 0.5),
    ],
)
def test_alpha_falls_with_rollout_batches(settings, steps_per_batch, tmp_path):
    max_steps = 8 if steps_per_batch > 1 else 4
    trainer = make_trainer(
        tmp_path, cls=RecordingTrainer, expert_decay_steps=3, max_steps=max_steps, max_completion_length=4, **settings
    )
    trainer.train()
    count = math.ceil(max_steps / steps_per_batch)
    expected = [max(0.0, (1 + math.cos(math.pi * min(k, 3) / 3)) / 2) for k in range(count)]
    assert [batch["alpha"] for batch in trainer.batches] == pytest.approx(expected)
    assert [batch["global_step"] for batch in trainer.batches] == [int(k * steps_per_batch) for k in range(count)]
    assert [bool(batch["guided"].any()) for batch in trainer.batches] == [a > 0.0 for a in expected]
    assert trainer.algorithm.guidance.batches == count


def test_after_the_decay_it_is_plain_grpo(tmp_path):
    trainer = make_trainer(
        tmp_path, cls=RecordingTrainer, expert_decay_steps=2, max_steps=4, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.engine.sampler.expert is None
    entries = [entry for entry in history(trainer) if ours(entry)]
    assert [any("/mixed/" in name for name in entry) for entry in entries] == [True, True, False, False]
    assert [entry["mentor/alpha"] for entry in entries] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    assert "mentor/gamma" not in entries[2] and "mentor/weight" not in entries[2]
    for batch in trainer.batches[2:]:
        assert batch["advantages"].dim() == 1
        rows = advantages_by_hand(batch["rewards"].tolist(), 8, 0, 0.0)
        assert batch["advantages"].tolist() == pytest.approx(rows, abs=1e-5)


class Calls:
    """Counts the forward passes of a model."""

    def __init__(self, model):
        self.count = 0
        model.base_model.register_forward_hook(self)

    def __call__(self, *args):
        self.count += 1


def test_evaluation_never_asks_the_expert(tmp_path):
    trainer = make_trainer(tmp_path, trainer_kwargs={"eval_dataset": prompts(2)})
    calls = Calls(trainer.engine.sampler.expert)
    metrics = trainer.evaluate()
    assert calls.count == 0 and "eval_reward" in metrics
    assert not [name for name in trainer.state.log_history[-1] if "mentor" in name]
    trainer.train()
    asked = calls.count
    assert asked > 0
    trainer.evaluate()
    assert calls.count == asked


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / "completions" / f"completions_{name}.parquet")


def test_completion_tables_of_training_and_evaluation(tmp_path):
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        log_completions=True,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        expert_decay_steps=2,
        trainer_kwargs={"eval_dataset": prompts(2)},
    )
    trainer.train()
    for step, batch in enumerate(trainer.batches, start=1):
        rows = table(tmp_path, f"{step:05d}")
        mixed = ["on_policy"] * 4 + ["mixed"] * 4
        assert rows["source"].tolist() == (mixed if step < 3 else ["on_policy"] * 8)
        assert rows["letters_reward"].tolist() == batch["rewards"].tolist()
        # A_i, before the correction
        assert rows["advantage"].tolist() == pytest.approx(
            advantages_by_hand(batch["rewards"].tolist(), 8, 4 if step < 3 else 0, batch["alpha"]), abs=1e-5
        )
        evaluated = table(tmp_path, f"eval_{step:05d}")
        assert evaluated["source"].tolist() == ["eval"] * 16
        assert set(evaluated["step"]) == {step}
    assert len(list((tmp_path / "completions").iterdir())) == 6


def test_each_evaluation_set_has_its_table(tmp_path):
    trainer = make_trainer(
        tmp_path,
        log_completions=True,
        eval_strategy="steps",
        eval_steps=2,
        trainer_kwargs={"eval_dataset": {"sums": prompts(1), "more": prompts(2), "org/set": prompts(1)}},
    )
    trainer.train()
    assert len(table(tmp_path, "eval_sums_00002")) == 8
    assert len(table(tmp_path, "eval_org-set_00002")) == 8
    assert len(table(tmp_path, "eval_more_00002")) == 16
    assert set(table(tmp_path, "00002")["source"]) == {"on_policy", "mixed"}


@pytest.fixture(scope="module")
def constant_batch(tmp_path_factory):
    """A rollout batch whose per-token advantages are those of its rows: the exponent 0 is no correction."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("constant"), cls=RecordingTrainer, correction_exponent=0.0, max_steps=1
    )
    trainer.train()
    return trainer.batches[0]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_takes_per_token_advantages(loss_type, level, tmp_path, constant_batch):
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        loss_type=loss_type,
        importance_sampling_level=level,
        steps_per_generation=2,
        epsilon_high=5.0 if loss_type == "cispo" else 0.28,
    )
    start = weights(trainer)
    trainer.train()
    assert not same_weights(weights(trainer), start)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)

    # Constant advantages over the tokens of a row give the loss of TRL's own shape
    trainer.model.train()
    inputs = {name: value for name, value in constant_batch.items() if isinstance(value, torch.Tensor)}
    per_token = trainer._compute_loss(trainer.model, inputs)
    inputs["advantages"] = inputs["advantages"][:, 0]
    assert torch.allclose(per_token, trainer._compute_loss(trainer.model, inputs), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5, "steps_per_generation": 2},
        {"entropy_coef": 0.01},
        {"delta": 2.0, "steps_per_generation": 2},
        {"num_iterations": 2, "beta": 0.02, "use_bias_correction_kl": True},
        {"draft_length": 2, "adaptive_draft_length": True, "rollout_batch_size": 3},
        {"temperature": 0.7},
        {"gradient_checkpointing": True},
        {"num_mixed_generations": 6},
        {"alpha_schedule": "linear"},
        {"alpha_schedule": "constant"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_options_that_train(settings, tmp_path, tiny_model_dir):
    trainer = make_trainer(tmp_path, model=str(tiny_model_dir), **settings)
    start = weights(trainer)
    trainer.train()
    end = weights(trainer)
    assert not same_weights(start, end) and all(value.isfinite().all() for value in end.values())


def test_truncated_completions_are_masked(tmp_path):
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        mask_truncated_completions=True,
        gradient_accumulation_steps=2,
        max_completion_length=24,
    )
    trainer.train()
    for batch in trainer.batches:
        # A row ends with <eos>, or with the padding of a shorter row
        ended = torch.isin(batch["completion_ids"][:, -1], torch.tensor([0, 2]))
        assert ended.any() and not ended.all()
        assert torch.equal(batch["completion_mask"].any(1), ended)
        assert batch["row_advantages"] == pytest.approx(
            advantages_by_hand(batch["rewards"].tolist(), 8, 4, batch["alpha"]), abs=1e-5
        )
    for entry in history(trainer):
        if ours(entry):
            truncated = [entry[f"mentor/{source}/truncated"] for source in ("on_policy", "mixed")]
            assert sum(truncated) / 2 == pytest.approx(entry["completions/clipped_ratio"])


def make_endless_model(seed: int):
    """It never says `<pad>` or `<eos>`."""
    model = make_tiny_model(seed=seed)
    impossible = torch.zeros(64).index_fill(0, torch.tensor([0, 2]), -1e4)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + impossible)
    return model


def test_a_batch_of_truncated_completions_trains_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        model=make_endless_model(seed=0),
        trainer_kwargs={"expert": make_endless_model(seed=1), "expert_processing_class": make_tiny_tokenizer()},
        mask_truncated_completions=True,
        weight_decay=0.0,
    )
    start = weights(trainer)
    trainer.train()
    assert [entry["completions/clipped_ratio"] for entry in trainer.state.log_history[:2]] == [1.0, 1.0]
    assert any((torch.tensor(batch["row_advantages"]) != 0.0).any() for batch in trainer.batches)
    assert same_weights(weights(trainer), start)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:2])


def test_kl_and_entropy_by_source_add_up(tmp_path, tiny_model_dir):
    with pytest.warns(UserWarning, match=r"`beta=0.05`.*Compare `mentor/on_policy/kl` with `mentor/mixed/kl`"):
        trainer = make_trainer(tmp_path, model=str(tiny_model_dir), beta=0.05, max_steps=3)
    trainer.train()
    entries = [entry for entry in history(trainer) if ours(entry)]
    for entry in entries:
        tokens = [entry[f"mentor/{source}/length"] for source in ("on_policy", "mixed")]
        for name in ("kl", "entropy"):
            parts = [entry[f"mentor/{source}/{name}"] for source in ("on_policy", "mixed")]
            mean = sum(n * value for n, value in zip(tokens, parts)) / sum(tokens)
            assert mean == pytest.approx(entry[name], rel=1e-4, abs=1e-7)
    assert entries[-1]["mentor/mixed/kl"] > 0.0


@pytest.mark.parametrize("rule", ["entropy", "threshold", "random", "always"])
def test_branch_rules_and_gamma(rule, tmp_path, monkeypatch):
    sampled, sample = [], LocalSession.sample
    monkeypatch.setattr(LocalSession, "sample", lambda *args: sampled.append(sample(*args)) or sampled[-1])
    trainer = make_trainer(
        tmp_path, cls=RecordingTrainer, branch_rule=rule, entropy_quantile=0.6, gradient_accumulation_steps=2
    )
    trainer.train()
    for batch, on_policy, mixed in zip(trainer.batches, sampled[::2], sampled[1::2], strict=True):
        entropies = on_policy.entropies[on_policy.mask].double()
        assert batch["gamma"] == pytest.approx(entropies.quantile(0.6).item(), rel=1e-6)
        assert batch["share"] == pytest.approx((entropies / batch["gamma"]).clamp(max=1).mean().item(), rel=1e-6)
        assert (on_policy.weights[on_policy.mask] == 0.0).all() and not on_policy.branch.any()
        h, w = mixed.entropies[mixed.mask], mixed.weights[mixed.mask]
        expected = {
            "entropy": (h / batch["gamma"]).clamp(max=1.0),
            "threshold": (h >= batch["gamma"]).float(),
            "random": torch.full_like(h, batch["share"]),
            "always": torch.ones_like(h),
        }[rule]
        torch.testing.assert_close(w, expected)
        assert mixed.branch.any()


def test_padding_to_a_multiple(tmp_path):
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, pad_to_multiple_of=16, gradient_accumulation_steps=2)
    trainer.train()
    for batch in trainer.batches:
        assert batch["completion_ids"].size(1) == batch["advantages"].size(1) == 16
        rows = advantages_by_hand(batch["rewards"].tolist(), 8, 4, batch["alpha"])
        assert batch["advantages"][~batch["guided"]].mean(1).tolist() == pytest.approx(
            [a for a, mixed in zip(rows, batch["guided"].tolist()) if not mixed], abs=1e-5
        )


def test_the_same_seed_gives_the_same_run_and_another_seed_another(guided, tmp_path):
    for seed in (3, 4):
        trainer = make_trainer(tmp_path, seed=seed, **GUIDED)
        trainer.train()
        assert (history(trainer) == history(guided[0])) is (seed == 3)
        assert same_weights(weights(trainer), weights(guided[0])) is (seed == 3)


# With the rest of the ecosystem


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_peft_policy(gradient_checkpointing, tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        gradient_checkpointing=gradient_checkpointing,
        beta=0.02,
        trainer_kwargs={"peft_config": peft_config},
    )
    start = weights(trainer)
    trainer.train()
    end = weights(trainer)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if "lora" in name}
    # The adapter is on while sampling, and dropout and adapters are as they were afterwards
    assert history(trainer)[0]["mentor/mixed/kl"] > 0.0
    assert sampled_logp_gap(trainer, start) < 1e-4


def sampled_logp_gap(trainer: RecordingTrainer, start: dict[str, torch.Tensor]) -> float:
    """Median |log p of the engine - log p of the trainer| over the tokens of the first mixed rows."""
    trainer.model.load_state_dict(start)
    batch = trainer.batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].size(1)
    trainer.model.train()
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length)
    rollout = batch["rollout"].padded(length)
    return (rollout.logps - logps[batch["guided"]])[rollout.mask].abs().median().item()


def test_bf16_autocast_samples_from_the_policy_that_is_trained(tmp_path):
    """
    With weights in float32 and `bf16=True` both the engine and the loss run under autocast. Their kernels differ (one
    token at a time against whole sequences), so log-probabilities agree up to bfloat16's rounding only. Sampling
    without autocast would go unnoticed by such a bound, so the engine's context is checked as well.
    """
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, bf16=True)
    start = weights(trainer)
    assert start["lm_head.weight"].dtype == torch.float32
    dtypes = set()
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert sampled_logp_gap(trainer, start) < 0.03


def test_expert_in_bfloat16(tmp_path, tiny_expert_dir):
    trainer = make_trainer(tmp_path, expert_model_name_or_path=str(tiny_expert_dir), expert_dtype="bfloat16")
    assert trainer.engine.sampler.expert.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    trainer.train()
    assert trainer.state.log_history[0]["mentor/branch_rate"] > 0.0


def test_an_expert_is_the_same_however_it_is_given(guided, tmp_path, tiny_expert_dir):
    """As a folder, as a field that names it, and as the model that `guided` has."""
    folder = str(tiny_expert_dir)
    for way in ({"trainer_kwargs": {"expert": folder}}, {"expert_model_name_or_path": folder}):
        trainer = make_trainer(tmp_path, **GUIDED, **way)
        trainer.train()
        assert same_weights(weights(trainer), weights(guided[0]))


def test_an_adapter_is_an_expert(tmp_path, tiny_expert_dir):
    base = make_tiny_model(seed=1)
    base.name_or_path = base.config._name_or_path = str(tiny_expert_dir)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(tmp_path / "a", expert_model_name_or_path=str(tmp_path / "adapter"))
    trainer.train()
    expert = trainer.engine.sampler.expert
    assert not isinstance(expert, PeftModel)
    ids = torch.arange(10).view(1, -1)
    expected = adapted.eval()(input_ids=ids).logits
    torch.testing.assert_close(expert(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, make_tiny_model(seed=1)(input_ids=ids).logits, atol=1e-2)


def test_embeddings_padded_differently(tmp_path):
    """The expert's rows beyond the tokenizer's ids never speak, even if they are the likeliest."""
    expert = make_tiny_model(seed=1, vocab_size=72, arch="qwen2")
    expert.lm_head.weight.data[64:] *= 50.0
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        model=make_tiny_model(arch="qwen2"),
        branch_rule="always",
        trainer_kwargs={"expert": expert, "expert_processing_class": make_tiny_tokenizer()},
    )
    trainer.train()
    assert all((batch["completion_ids"] < 64).all() for batch in trainer.batches)
    rollout = trainer.batches[0]["rollout"]
    assert rollout.expert_logps[rollout.branch].isfinite().all()


def test_a_stream_of_prompts(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"prompt": f"{i}+{i}="} for i in range(40)))
    trainer = make_trainer(tmp_path, train_dataset=stream)
    start = weights(trainer)
    trainer.train()
    assert not same_weights(weights(trainer), start)


def test_conversations(tmp_path):
    dataset = prompts().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, train_dataset=dataset, log_completions=True)
    trainer.train()
    first = trainer.batches[0]["prompt_ids"][0].tolist()
    assert trainer._tokenizer.convert_ids_to_tokens(first)[:2] == ["<bos>", "<user>"]
    assert table(tmp_path, "00001")["source"].tolist() == ["on_policy"] * 4 + ["mixed"] * 4


def test_extended_stop_tokens_end_both_sources(tmp_path):
    expert = make_tiny_model(seed=1)
    expert.generation_config.eos_token_id = [2, 20]
    trainer = make_trainer(
        tmp_path,
        cls=RecordingTrainer,
        extend_stop_tokens=True,
        max_completion_length=32,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        trainer_kwargs={
            "expert": expert,
            "expert_processing_class": make_tiny_tokenizer(),
            "eval_dataset": prompts(1),
        },
    )
    assert trainer.eos_token_ids == [2, 20]
    trainer.train()
    lasts = set()
    for batch in trainer.batches:
        for ids, mask, mixed in zip(batch["completion_ids"], batch["completion_mask"].bool(), batch["guided"]):
            assert 20 not in ids[mask][:-1]
            lasts.add((bool(mixed), int(ids[mask][-1])))
    assert {(False, 20), (True, 20)} <= lasts


# Model card


def test_model_card(tmp_path, tiny_expert_dir):
    trainer = make_trainer(
        tmp_path,
        expert_model_name_or_path=str(tiny_expert_dir),
        num_mixed_generations=3,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    header, body = card.split("---")[1], card.split("---", 2)[2]
    assert "- mentor\n" in header and "- trl\n" in header and "- grpo\n" not in header
    assert "MENTOR" in body and "https://huggingface.co/papers/2510.04140" in body
    assert "jiang2026selective" in body and "2402.03300" not in body
    assert "in 3 of the 8 rollouts of each prompt" in body
    assert tiny_expert_dir.name in body and str(tiny_expert_dir.parent) not in body
    assert (tmp_path / "checkpoint-1").is_dir()
    assert "mentor" in trainer.model.model_tags


def test_model_card_of_plain_grpo_claims_nothing(tmp_path):
    trainer = make_trainer(tmp_path, num_mixed_generations=0, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "GRPO" in card and "- grpo" in card and "mentor" not in card.lower() and "2510.04140" not in card


def test_model_card_links_an_expert_of_the_hub(tmp_path):
    expert = make_tiny_model(seed=1)
    expert.config._name_or_path = "open-r1/OpenR1-Qwen-7B"
    trainer = make_trainer(
        tmp_path, trainer_kwargs={"expert": expert, "expert_processing_class": make_tiny_tokenizer()}
    )
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "[open-r1/OpenR1-Qwen-7B](https://huggingface.co/open-r1/OpenR1-Qwen-7B)" in card


def test_plain_grpo_with_a_rollout_function(tmp_path):
    """The method that samples is then not called; the rows are those that the rewards see."""

    def rollout(prompts, trainer):
        ids = [[9, 10, 2] for _ in prompts]
        return {"prompt_ids": [[4, 5]] * len(prompts), "completion_ids": ids, "logprobs": [[-1.0] * 3] * len(prompts)}

    trainer = make_trainer(
        tmp_path, num_mixed_generations=0, max_steps=1, trainer_kwargs={"rollout_func": rollout}, log_completions=True
    )
    trainer.train()
    assert trainer.state.log_history[0]["mentor/on_policy/length"] == 3.0
    assert set(pd.read_parquet(tmp_path / "completions/completions_00001.parquet")["source"]) == {"on_policy"}


def test_virtual_tokens_are_refused(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        make_trainer(tmp_path, trainer_kwargs={"peft_config": config})


def test_float32_head_samples_from_the_policy_that_is_trained(tmp_path):
    """The head then runs outside of autocast, in the engine as in the loss."""
    trainer = make_trainer(tmp_path, cls=RecordingTrainer, bf16=True, cast_lm_head_to_fp32=True)
    start, dtypes = weights(trainer), set()
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.float32}
    assert sampled_logp_gap(trainer, start) < 0.03


def test_records_of_rollouts_are_kept_where_asked_for(guided, tmp_path):
    from mentor_trl.training.rollout_log import read_records

    trainer = make_trainer(tmp_path, cls=RecordingTrainer, log_rollout_records=6, num_mixed_generations=4)
    trainer.train()
    for step, batch in enumerate(trainer.batches, start=1):
        records = read_records(tmp_path, step)
        assert [record.source for record in records] == ["on_policy"] * 4 + ["mixed"] * 2
        for i, record in enumerate(records):
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            assert record.token_ids == ids and record.reward == batch["rewards"][i].item()
            if record.source == "mixed":
                assert record.branch == batch["rollout"].branch[i - 4, : len(ids)].tolist()
    assert (tmp_path / "rollouts").exists() and not (Path(guided[0].args.output_dir) / "rollouts").exists()
