"""Runs in which the expert scores: when it is let go, where it may be, and what is refused."""

import gc
import weakref

import pytest
import torch
from trl.trainer import grpo_trainer

from fake_server import serving
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig
from mentor_trl.errors import SetupError
from mentor_trl.rollout.local import scoring_engine
from stock_server import StockServer
from trainer_helpers import RecordingTrainer, history, make_trainer, same_weights, weights


PLAIN = {"num_mixed_generations": 0}


def run(folder, **settings):
    trainer = make_trainer(folder, cls=RecordingTrainer, **settings)
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[f"mentor/distillation/{name}"] for entry in history(trainer) if "loss" in entry]


def scripted(rewards: list[float]):
    """Rewards of the batches one after the other, with a little spread around each."""
    coming = iter(rewards)

    def reward(completions, **kwargs):
        mean = next(coming)
        return [mean + (0.01 if i % 2 else -0.01) for i in range(len(completions))]

    return reward


# GATS


def test_the_gap_follows_the_averages_until_the_policy_is_level(tmp_path):
    settings = {"distillation": "gats", "gats_reference": 0.8, "gats_smoothing": 0.5, "distillation_coef": 2.0}
    trainer = run(tmp_path, reward_funcs=scripted([0.2, 0.6, 1.0, 1.0, 0.0]), max_steps=5, **PLAIN, **settings)
    assert logged(trainer, "student")[:4] == pytest.approx([0.2, 0.4, 0.7, 0.85])
    # For good, whatever the policy's score is later
    assert logged(trainer, "coef") == pytest.approx([2 * 0.75, 2 * 0.5, 2 * 0.125, 0.0, 0.0])
    assert logged(trainer, "withdrawn") == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert [len(batch["advantages"].shape) for batch in trainer.batches] == [2, 2, 2, 1, 1]
    assert [name for name in history(trainer)[-2] if name.endswith("expert_tokens")] == []


def test_a_few_batches_are_not_parity(tmp_path):
    settings = {"distillation": "gats", "gats_reference": 0.5, "gats_smoothing": 0.75, "max_steps": 5, **PLAIN}
    trainer = run(tmp_path, reward_funcs=scripted([0.9, 0.9, 0.1, 0.9, 0.1]), **settings)
    assert logged(trainer, "withdrawn") == [0.0, 0.0, 0.0, 1.0, 1.0] and logged(trainer, "coef") == [0.0] * 5
    assert logged(trainer, "student")[:4] == pytest.approx([0.9, 0.9, 0.7, 0.75])


def test_an_expert_that_is_let_go_leaves_memory(tmp_path):
    expert = make_tiny_model(seed=1)
    given = {"expert": expert, "expert_processing_class": make_tiny_tokenizer()}
    settings = {"distillation": "gats", "gats_reference": 0.5, "reward_funcs": scripted([0.4, 0.9, 0.9])}
    trainer = make_trainer(tmp_path, **PLAIN, **settings, gats_smoothing=0.0, max_steps=3, trainer_kwargs=given)
    alive = weakref.ref(expert)
    del expert, given
    trainer.train()
    gc.collect()
    assert trainer.engine.released and trainer.algorithm.context.expert is None and alive() is None


def test_the_experts_score_may_be_that_of_mixed_rows(tmp_path):
    def reward(completions, **kwargs):
        return [0.25] * 3 + [0.5] + [0.75] * 4

    settings = {"distillation": "gats", "reward_funcs": reward, "expert_decay_steps": 2, "max_steps": 3}
    trainer = run(tmp_path, **settings)
    assert logged(trainer, "teacher") == [0.75] * 3
    assert trainer.algorithm.student == pytest.approx(0.9 * 0.3125 + 0.1 * 0.53125)
    # The expert stays when rollouts are not mixed any more, as its scores are wanted
    assert logged(trainer, "coef")[2] > 0.0 and not trainer.engine.released


RESUMED = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 10, "save_strategy": "steps", "save_steps": 6}
METHODS = {
    "gats": {"distillation": "gats", "gats_reference": 0.9, **PLAIN},
    "gats_full_on_mixed": {"distillation": "gats", "distillation_loss": "full", "expert_decay_steps": 4},
    "distilled_rl": {"distillation": "distilled_rl", **PLAIN},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cut_goes_on_to_the_same_numbers(method, tmp_path):
    """In the second pass over the second batch, whose weight is not that of the next."""
    whole = run(tmp_path / "whole", **RESUMED, **METHODS[method])
    resumed = make_trainer(tmp_path / "resumed", cls=RecordingTrainer, **RESUMED, **METHODS[method])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same_weights(weights(resumed), weights(whole))
    assert resumed.algorithm.state_dict() == whole.algorithm.state_dict()


# Which tokens


def test_only_rows_that_did_well_are_given_to_the_expert(tmp_path):
    trainer = run(tmp_path, distillation="distilled_rl", max_steps=1, **PLAIN)
    (batch,) = trainer.batches
    good = torch.tensor(batch["row_advantages"]) > 0.0
    assert logged(trainer, "expert_tokens") == [batch["completion_mask"][good].sum().item()]
    rows = torch.tensor(batch["row_advantages"]).unsqueeze(1)
    ratios = (batch["advantages"] / rows).masked_fill(batch["completion_mask"] == 0, 1.0)
    assert (ratios[~good] == 1.0).all() and ratios[good].min() < 0.7 and ratios[good].max() > 1.4
    assert ratios[good].log().sum(1).abs().max() < 1e-4
    assert logged(trainer, "weight")[0] > 1.0 and 0.0 < logged(trainer, "clipped")[0] < 1.0


def test_tokens_that_the_expert_never_writes_have_a_bounded_advantage(tmp_path):
    """The policy has more rows in its embedding than the tokenizer has ids, and than the expert has."""
    policy = make_tiny_model(seed=0, vocab_size=72)
    given = {"expert": make_tiny_model(seed=1), "expert_processing_class": make_tiny_tokenizer()}
    settings = {"model": policy, "trainer_kwargs": given, "max_steps": 2, "max_completion_length": 24}
    for loss in ("sampled", "full"):
        trainer = run(tmp_path / loss, distillation="opd", distillation_loss=loss, **PLAIN, **settings)
        assert (trainer.batches[0]["completion_ids"] >= 64).any()
        assert all(entry["grad_norm"] < 1e4 for entry in history(trainer) if "loss" in entry)
    sampled = run(tmp_path, distillation="opd", **PLAIN, **settings)
    unknown = sampled.batches[0]["completion_ids"] >= 64
    assert (sampled.batches[0]["advantages"][unknown] == -20.0).all()
    assert logged(sampled, "impossible")[0] == pytest.approx((unknown.sum() / unknown.numel()).item(), rel=0.2)


# Where policy and expert are


def test_an_expert_on_a_server_gives_the_same_advantages(tmp_path):
    stock = StockServer(make_tiny_model(seed=1), make_tiny_tokenizer(), stops=(2,))
    runs = [run(tmp_path / "here", distillation="opd", max_steps=1, temperature=0.7, **PLAIN)]
    with serving(stock) as url:
        settings = {"expert_base_url": url, "trainer_kwargs": {"expert": None}, "temperature": 0.7, **PLAIN}
        runs.append(run(tmp_path / "served", distillation="opd", max_steps=1, **settings))
    here, served = (trainer.batches[0] for trainer in runs)
    assert torch.equal(here["completion_ids"], served["completion_ids"])
    torch.testing.assert_close(served["advantages"], here["advantages"], atol=1e-3, rtol=1e-3)
    assert runs[1].engine.remote


class Generation:
    """What TRL's vLLM backend does for its trainer: fixed completions of known log-probabilities."""

    def __init__(self, **kwargs):
        self.synced = 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        rows = [[10 + (7 * i + j) % 40 for j in range(3 + i % 4)] for i in range(len(prompts))]
        return prompts, rows, [[[-4.0]] * len(row) for row in rows], None


@pytest.fixture
def trls_vllm(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Generation)
    monkeypatch.setattr(scoring_engine, "check_vllm", lambda *args: None)
    return {"use_vllm": True, "vllm_mode": "colocate", "distillation": "opd", **PLAIN}


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_rows_of_trls_own_vllm_are_scored_in_this_process(loss, trls_vllm, tmp_path):
    trainer = run(tmp_path, distillation_loss=loss, **trls_vllm)
    assert trainer.vllm_generation.synced == 2
    assert not trainer.engine.remote and trainer.engine.expert is not None
    batch = trainer.batches[0]
    mask = batch["completion_mask"].bool()
    completions = [row[known].tolist() for row, known in zip(batch["completion_ids"], mask)]
    assert completions == Generation().generate(batch["prompt_tokens"], None, 8, None)[1]
    if loss == "sampled":
        logs = trainer.engine.expert.score(batch["prompt_tokens"], completions)
        expected = (logs - batch["old_per_token_logps"])[mask]
        torch.testing.assert_close(batch["advantages"][mask], expected, atol=1e-4, rtol=1e-4)
    else:
        assert all(entry["mentor/on_policy/reverse_kl"] > 0.1 for entry in history(trainer) if "loss" in entry)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer_kwargs": {"expert": None}}, "`distillation='opd'` needs an expert"),
        ({"num_mixed_generations": 4, "vllm_mode": "server"}, "Opd asks for log-probabilities.*`expert_base_url`"),
    ],
    ids=["no_expert", "shared_engine"],
)
def test_experts_that_cannot_be_asked(settings, message, trls_vllm, tmp_path):
    from served_helpers import stand_in

    with stand_in(), pytest.raises(SetupError, match=message):
        make_trainer(tmp_path, **{"trainer_kwargs": {"expert": None}, **trls_vllm, **settings})


REFUSED = {
    "unknown": ({"distillation": "sft"}, "`distillation` is 'sft'; choose one of 'none', 'opd'"),
    "loss": ({"distillation_loss": "half"}, "`distillation_loss` is 'half'"),
    "weight": ({"distillation_coef": 0.0}, "`distillation_coef` is 0.0; it must be positive"),
    "bound": ({"distillation_clip": 0.5}, "`distillation_clip` is 0.5; it must be at least 1"),
    "cut": ({"top_p": 0.9}, "`top_p=0.9` changes the sampling distribution.*set `distillation` to 'none'"),
    "trajectories": ({"num_trajectory_generations": 1}, "`num_trajectory_generations=1` and `distillation='opd'`"),
    "sequence": ({"importance_sampling_level": "sequence"}, "`importance_sampling_level='sequence'`.*own advantage"),
    "sums": ({"loss_type": "luspo"}, "`loss_type='luspo'`: distillation gives each token its own"),
    "served": ({"distillation_loss": "full", "expert_base_url": "http://a:1"}, "`distillation_loss='full'` needs the"),
    "twice": ({"expert_base_url": "http://a:1", "expert_dtype": "bfloat16"}, "`expert_dtype='bfloat16'` applies to"),
    "entropy": ({"distillation_loss": "top_k", "top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2` leaves"),
    "all_mixed": ({"distillation": "distilled_rl", "num_mixed_generations": 8}, "on-policy rollouts.*leaves none"),
    "no_reference": ({"distillation": "gats"}, "`distillation='gats'` compares.*Set `gats_reference`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case, tmp_path):
    settings, message = REFUSED[case]
    settings = {"num_mixed_generations": 0, "distillation": "opd", "remove_unused_columns": False, **settings}
    with pytest.raises(ValueError, match=message):
        MentorGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("loss", ["top_k", "full"])
def test_shards_are_refused_where_the_head_is_read(loss, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SetupError, match=f"FSDP is not supported with `distillation_loss='{loss}'`"):
        make_trainer(tmp_path, distillation="opd", distillation_loss=loss, **PLAIN)


def test_tools_are_refused(tmp_path):
    with pytest.raises(SetupError, match="`tools` is not supported with `distillation='opd'`"):
        make_trainer(tmp_path, distillation="opd", trainer_kwargs={"tools": [len]}, **PLAIN)


@pytest.mark.parametrize(("method", "mixed"), [("opd", 0), ("gats", 4), ("distilled_rl", 0)])
def test_the_model_card_says_what_the_expert_did(method, mixed, tmp_path):
    trainer = run(tmp_path, distillation=method, num_mixed_generations=mixed, max_steps=1)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    chose = "chose some of the tokens in 4 of the 8 rollouts of each prompt and " if mixed else ""
    assert f"It {chose}scored the tokens that this model wrote, and is not needed" in text
    assert f"| distillation | `{method}` |" in text and ("| alpha |" in text) == bool(mixed)
    assert {"opd": "2306.13649", "distilled_rl": "2607.17247", "gats": "GATS"}[method] in text
