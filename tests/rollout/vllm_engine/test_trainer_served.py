"""The trainer with a server, whose place an in-process engine takes here. Real servers are in tests/vllm_trainer."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig
from mentor_trl.connection.failures import ServerError, WeightsLost, WrongServer
from mentor_trl.errors import SetupError
from mentor_trl.objective import sentence_endings
from mentor_trl.rollout.serving import generation as serving
from mentor_trl.rollout.serving.weights import new_run_id, remove_weights
from mentor_trl.rollout.vllm import backend as generation
from mentor_trl.rollout.vllm.vllm_engine import VLLMSetup
from mentor_trl.vllm_server.token_table import TokenTable
from served_helpers import StandIn, make_served_trainer, stand_in
from trainer_helpers import SETTINGS, history, prompts, same_weights, weights


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Three steps with a server, and whether it had the policy's weights after each push."""
    with stand_in() as servers:
        trainer = make_served_trainer(tmp_path_factory.mktemp("served"), max_steps=3, num_mixed_generations=5)
        equal, sync = [], trainer.vllm_generation.sync_weights

        def spy():
            sync()
            equal.append(same_weights(weights(trainer), servers[0].policy.state_dict()))

        trainer.vllm_generation.sync_weights = spy
        trainer.train()
    return trainer, servers[0], equal


@pytest.mark.parametrize("level", ["conditional", "mixture"])
def test_log_probabilities_of_the_engine_are_corrected_by_trl_outside_branch_points_only(level, tmp_path):
    with stand_in() as servers:
        trainer = make_served_trainer(tmp_path, correction_level=level, correction_exponent=1.0)
        trainer.train()
    for batch in trainer.batches:
        rollout, mixed = batch["rollout"], batch["guided"]
        length = batch["completion_ids"].size(1)
        sampled = batch["sampling_per_token_logps"]
        here = rollout.padded(length)
        assert torch.equal(sampled[mixed].isnan(), here.branch)
        assert not sampled[~mixed].isnan().any()
        torch.testing.assert_close(batch["old_per_token_logps"][mixed][here.mask], here.logps[here.mask])
        torch.testing.assert_close(
            batch["importance_sampling_ratio"], torch.ones_like(batch["importance_sampling_ratio"])
        )
    assert len(servers[0].versions) == 2 == len(set(servers[0].versions))


def test_at_branch_points_the_ratio_takes_p_of_the_training_model(tmp_path, monkeypatch):
    """An engine whose p is off by a constant: TRL's ratio sees it at policy tokens, ours at expert tokens."""
    off, sample = 0.5, StandIn.sample

    def mismatched(self, request, progress=None):
        rollout = sample(self, request)
        rollout.logps = rollout.logps - off
        return rollout

    monkeypatch.setattr(StandIn, "sample", mismatched)
    settings = {"correction_exponent": 1.0, "correction_cap": math.inf, "max_steps": 1}
    settings |= {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 100.0}
    with stand_in():
        trainer = make_served_trainer(tmp_path, alpha=1.0, reward_range=100.0, **settings)
        trainer.train()
    (batch,) = trainer.batches
    mixed, length = batch["guided"], batch["completion_ids"].size(1)
    rollout = batch["rollout"].padded(length)
    ratio = batch["importance_sampling_ratio"]
    tokens = batch["completion_mask"].bool()
    policy = tokens.clone()
    policy[mixed] &= ~rollout.branch
    torch.testing.assert_close(ratio[policy], torch.full_like(ratio[policy], math.exp(off)))
    assert (ratio[~policy] == 1.0).all()
    rho = batch["advantages"][mixed] / torch.tensor(batch["row_advantages"])[mixed].unsqueeze(1)
    branch = rollout.branch & rho.isfinite()
    expected = (batch["old_per_token_logps"][mixed] - rollout.expert_logps).exp()
    assert branch.any()
    torch.testing.assert_close(rho[branch], expected[branch], rtol=1e-4, atol=1e-6)


def test_rows_that_are_left_out_have_the_ratios_of_the_engine(tmp_path):
    logged = []
    for masked in (False, True):
        with stand_in():
            trainer = make_served_trainer(tmp_path / str(masked), max_steps=1, mask_truncated_completions=masked)
            trainer.train()
        (entry,) = (entry for entry in trainer.state.log_history if "mentor/branch_rate" in entry)
        logged.append({name: value for name, value in entry.items() if "mentor/importance_ratio" in name})
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)


def test_the_server_gets_the_weights_of_every_step_and_keeps_its_expert(served):
    _, server, equal = served
    assert equal == [True] * 3
    assert same_weights(server.expert.state_dict(), make_tiny_model(seed=1).state_dict())


def test_weights_of_earlier_steps_do_not_stay_on_disk(served):
    trainer, server, _ = served
    folder = Path(trainer.args.output_dir) / "_vllm_weights"
    assert [path.name for path in folder.iterdir()] == server.versions[-1:]
    (folder / "other-run-1").mkdir()
    remove_weights(folder, server.versions[-1].split("-")[0])  # as at exit
    assert [path.name for path in folder.iterdir()] == ["other-run-1"]


def test_on_policy_rows_come_first_and_give_gamma(served):
    trainer, server, _ = served
    for batch, first, second in zip(trainer.batches, server.requests[::2], server.requests[1::2], strict=True):
        assert first.gamma == [math.inf] * 3 and second.gamma == [batch["gamma"]] * 5
        assert first.stop_token_ids == second.stop_token_ids == (2,)


def test_evaluation_and_the_time_after_guidance_sample_the_policy(tmp_path):
    with stand_in() as servers:
        trainer = make_served_trainer(tmp_path, max_steps=3, expert_decay_steps=1)
        trainer.train()
        rows = len(servers[0].requests)
        trainer.evaluate(trainer.train_dataset.select(range(8)))
    gammas = [set(request.gamma) for request in servers[0].requests]
    assert gammas[2:] == [{math.inf}] * (len(gammas) - 2) and len(gammas) > rows
    assert trainer.batches[-1]["guided"].sum() == 0
    torch.testing.assert_close(
        trainer.batches[-1]["sampling_per_token_logps"], trainer.batches[-1]["old_per_token_logps"], equal_nan=True
    )


def test_adapters_are_merged_into_what_the_server_gets(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with stand_in() as servers:
        trainer = make_served_trainer(tmp_path, max_steps=2, trainer_kwargs={"expert": None, "peft_config": config})
        trainer.train()
        trainer.vllm_generation.sync_weights()
    assert not any(getattr(module, "merged", False) for module in trainer.model.modules())
    merged = trainer.model.merge_and_unload().state_dict()
    assert not same_weights(merged, make_tiny_model(seed=0).state_dict())
    for name, value in servers[0].policy.state_dict().items():
        torch.testing.assert_close(value, merged[name])


def test_a_push_that_fails_takes_adapters_apart_again(tmp_path, monkeypatch):
    def full(params, *args):
        next(params)
        raise OSError("No space left")

    monkeypatch.setattr(serving, "write_weights", full)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with stand_in():
        trainer = make_served_trainer(tmp_path, trainer_kwargs={"expert": None, "peft_config": config})
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert not any(getattr(module, "merged", False) for module in trainer.model.modules())


def test_weights_of_the_same_step_that_are_others_are_sent_as_well(tmp_path):
    """Those of the best step, loaded at the end, and those that a second run begins with."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_completions/mean_length"}
    best["greater_is_better"] = False
    with stand_in() as servers:
        trainer = make_served_trainer(
            tmp_path / "best", **best, trainer_kwargs={"expert": None, "eval_dataset": prompts(8)}
        )
        trainer.train()
        assert trainer.state.best_global_step < 3
        trainer.evaluate()
        assert same_weights(weights(trainer), servers[0].policy.state_dict())
    with stand_in() as servers:
        trainer = make_served_trainer(tmp_path / "again", max_steps=1)
        trainer.train()
        trainer.train()
    assert len(servers[0].versions) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_whose_server_dies_ends_with_a_checkpoint_and_resumes_to_the_same_numbers(accumulation, tmp_path):
    settings = {"max_steps": 4, "gradient_accumulation_steps": accumulation, "steps_per_generation": 1}
    settings |= {"log_completions": True, "logging_steps": 3}
    with stand_in():
        whole = make_served_trainer(tmp_path / "whole", **settings)
        whole.train()
    # The very last request of the third step, on-policy and mixed rows being two
    with stand_in({3 * accumulation * 2: ServerError}):
        broken = make_served_trainer(tmp_path / "broken", **settings)
        with pytest.raises(ServerError, match="is gone"), pytest.warns(UserWarning, match="Resume it from .*-2"):
            broken.train()
    with stand_in():
        resumed = make_served_trainer(tmp_path / "broken", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert same_weights(weights(whole), weights(resumed))
    skip = ("loss", "grad_norm", "train_loss")
    assert history(whole, without=skip)[-2:-1] == history(resumed, without=skip)[-2:-1]


def test_a_server_that_dies_before_the_first_step_leaves_nothing_to_resume(tmp_path):
    with stand_in({1: ServerError}):
        trainer = make_served_trainer(tmp_path)
        with pytest.raises(ServerError, match="is gone"):
            trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_lost_weights_are_sent_again(tmp_path):
    with stand_in({2: WeightsLost}) as servers:
        trainer = make_served_trainer(tmp_path, max_steps=1)
        trainer.train()
    assert len(servers[0].versions) == 2
    assert [len(request.prompt_ids) for request in servers[0].requests] == [4, 4, 4]
    with stand_in(dict.fromkeys(range(1, 9), WeightsLost)):
        with pytest.raises(WeightsLost):
            make_served_trainer(tmp_path, max_steps=1).train()


def test_trl_builds_our_backend_only_for_us(served, tmp_path):
    assert type(served[0].vllm_generation).__name__ == "MixedVLLMGeneration"
    original = grpo_trainer.VLLMGeneration
    with stand_in(), pytest.raises(ValueError, match=r"reward processing classes \(3\) must match"):
        make_served_trainer(tmp_path, trainer_kwargs={"expert": None, "reward_processing_classes": [1, 2, 3]})
    assert grpo_trainer.VLLMGeneration is original is VLLMGeneration


def test_a_second_server_samples_what_the_expert_has_no_part_in(tmp_path):
    """Its rows bring no entropies: gamma is that of a forward pass, and the run that of one server."""
    settings = {"max_steps": 3, "expert_decay_steps": 2, "gradient_accumulation_steps": 2}
    with stand_in():
        one = make_served_trainer(tmp_path / "one", **settings)
        one.train()
    with stand_in() as servers:
        two = make_served_trainer(tmp_path / "two", vllm_policy_server_base_url="http://policy:8000", **settings)
        two.train()
        two.evaluate(two.train_dataset.select(range(8)))
    mixed, policy = servers
    assert [len(request.prompt_ids) for request in mixed.requests] == [8, 8]
    assert all(gamma < math.inf for request in mixed.requests for gamma in request.gamma)
    assert [len(request.prompt_ids) for request in policy.requests][:4] == [8, 8, 16, 8]
    assert len(mixed.versions) == len(policy.versions) == 4
    for ours, theirs in zip(two.batches[:2], one.batches[:2], strict=True):
        assert ours["gamma"] == pytest.approx(theirs["gamma"], abs=1e-5)
        torch.testing.assert_close(ours["completion_ids"], theirs["completion_ids"])
        torch.testing.assert_close(ours["advantages"], theirs["advantages"])


@pytest.mark.parametrize(
    ("info", "settings", "message"),
    [
        ({"policy_shape": {"hidden_size": 64}}, {}, "of another shape.*hidden_size.: 64"),
        ({}, {"expert_model_name_or_path": "other/expert"}, "speaks for the expert 'hub/tiny-expert'.*'other/expert'"),
        ({"expert_stop_ids": [2, 7]}, {}, "do not end the policy's: 7 .*extend_stop_tokens"),
        ({"max_model_len": 10}, {}, "engine's context of 10 tokens.*--max-model-len"),
    ],
)
def test_a_server_that_does_not_fit_is_named(info, settings, message, tmp_path, monkeypatch):
    make = StandIn.__init__

    def unfit(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.info = {**self.info, **info}

    monkeypatch.setattr(StandIn, "__init__", unfit)
    with stand_in(), pytest.raises(SetupError, match=message):
        make_served_trainer(tmp_path, **settings)


@pytest.mark.parametrize("short", [0, 1])
def test_the_shorter_context_of_two_servers_is_the_limit(short, tmp_path, monkeypatch):
    make = StandIn.__init__

    def one_is_short(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if StandIn.made.index(self) == short:
            self.info["max_model_len"] = 10

    monkeypatch.setattr(StandIn, "__init__", one_is_short)
    with stand_in(), pytest.raises(SetupError, match="exceed the engine's context of 10 tokens"):
        make_served_trainer(tmp_path, vllm_policy_server_base_url="http://policy:8000")


def test_stop_ids_of_the_expert_can_be_added(tmp_path, monkeypatch):
    make = StandIn.__init__

    def more(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.info["expert_stop_ids"] = [2, 7]

    monkeypatch.setattr(StandIn, "__init__", more)
    with stand_in() as servers:
        trainer = make_served_trainer(tmp_path, extend_stop_tokens=True, max_steps=1)
        trainer.train()
    assert trainer.eos_token_ids == [2, 7] and servers[0].requests[0].stop_token_ids == (2, 7)


def test_a_wrong_server_fails_at_construction(tmp_path, monkeypatch):
    def wrong(self, *args, **kwargs):
        raise WrongServer("it is not a MENTOR server")

    monkeypatch.setattr(StandIn, "__init__", wrong)
    with stand_in(), pytest.raises(WrongServer, match="not a MENTOR server"):
        make_served_trainer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer_kwargs": {"expert": make_tiny_model(seed=1)}}, "The expert is a LlamaForCausalLM.*by name"),
        ({"expert_dtype": "bfloat16"}, "`expert_dtype='bfloat16'` applies to an expert that this process loads"),
        ({"vllm_structured_outputs_regex": "a+"}, "`vllm_structured_outputs_regex` is not supported"),
        ({"vllm_mode": "colocate"}, "No expert"),
        ({"vllm_weight_sync": "nccl"}, "`vllm_weight_sync='nccl'` needs a CUDA device.*'folder'"),
        (
            {
                "vllm_mode": "colocate",
                "expert_model_name_or_path": "e",
                "vllm_policy_server_base_url": "http://policy:8000",
            },
            "needs `vllm_mode='server'`",
        ),
        (
            {"vllm_mode": "colocate", "vllm_tensor_parallel_size": 2, "expert_model_name_or_path": "some/expert"},
            "`vllm_tensor_parallel_size=2`.*Set it to 1",
        ),
    ],
)
def test_what_is_refused(settings, message, tmp_path):
    if "trainer_kwargs" in settings:
        settings["trainer_kwargs"]["expert_processing_class"] = make_tiny_tokenizer()
    with stand_in(), pytest.raises(SetupError, match=message):
        make_served_trainer(tmp_path, **settings)


def test_time_outs_that_do_not_fit_each_other_are_warned_of(tmp_path, monkeypatch):
    settings = {**SETTINGS, "use_vllm": True, "vllm_mode": "server", "num_mixed_generations": 4}
    args = MentorGRPOConfig(str(tmp_path), vllm_read_timeout=1700.0, vllm_server_timeout=200.0, **settings)
    VLLMSetup(args, None, None).check(None, None)  # one process waits for nobody
    monkeypatch.setattr(MentorGRPOConfig, "world_size", 2)
    with pytest.warns(UserWarning, match=r"`ddp_timeout=1800` seconds .* \(1900\).*Raise `ddp_timeout`"):
        VLLMSetup(args, None, None).check(None, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"vllm_mode": "colocate", "expert_model_name_or_path": "no/expert"},
        {"vllm_mode": "colocate", "num_mixed_generations": 0},
        {"num_mixed_generations": 0},
    ],
)
def test_vllm_that_is_missing_is_named_before_models_load(settings, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "vllm" else find(name, *args))
    extra = "vllm" if settings.get("num_mixed_generations") == 0 else "vllm-shared"
    with pytest.raises(SetupError, match=rf"pip install 'mentor-trl\[{extra}\]'"):
        make_served_trainer(tmp_path, model="no/model", **settings)


def test_an_expert_of_the_same_name_that_is_another_is_refused(tmp_path):
    """Folders that are here are compared by what is in them, and all others by more than `checkpoint-100`."""
    for name, seed in (("a", 1), ("b", 2), ("copy", 1)):
        make_tiny_model(seed=seed).save_pretrained(tmp_path / name / "checkpoint-100")
    a, b, copy = (str(tmp_path / name / "checkpoint-100") for name in ("a", "b", "copy"))
    served = generation.files_digest(a)
    assert generation.same_model(a, a, served) and generation.same_model(copy, a, served)
    assert not generation.same_model(b, a, served)
    assert not generation.same_model(b, a) and not generation.same_model("x/checkpoint-100", "/srv/y/checkpoint-100")
    assert generation.same_model("x/checkpoint-100", "/srv/x/checkpoint-100", served)
    assert generation.same_model("org/model-7b", "/srv/model-7b") and not generation.same_model("org/a", "/srv/b")


def test_what_a_killed_run_left_is_removed(tmp_path):
    left, ours = (tmp_path / "_vllm_weights" / f"{name}-1" for name in (dead_run_id(), new_run_id()))
    for folder in (left, ours):
        folder.mkdir(parents=True)
    with stand_in():
        make_served_trainer(tmp_path)
    assert ours.exists() and not left.exists()


def dead_run_id() -> str:
    """Of a process that has ended."""
    script = "from mentor_trl.rollout.serving.weights import new_run_id; print(new_run_id())"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_the_key_reaches_both_servers(tmp_path):
    with stand_in() as servers:
        make_served_trainer(
            tmp_path, vllm_server_api_key_file="key", vllm_policy_server_base_url="http://policy:8000", max_steps=1
        )
    assert [server.api_key_file for server in servers] == ["key", "key"]


def test_the_servers_table_of_sentences_is_the_policys(tmp_path):
    settings = {"branch_rule": "sentence", "max_steps": 1}
    table = TokenTable(0, 0, tuple(sentence_endings(make_tiny_tokenizer())))
    with stand_in():
        with pytest.raises(SetupError, match=f"digest None, and here {table.digest}"):
            make_served_trainer(tmp_path, **settings)
        made = StandIn.__init__

        def told(self, *args, **kwargs):
            made(self, *args, **kwargs)
            self.info["sentences_digest"] = table.digest

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StandIn, "__init__", told)
            make_served_trainer(tmp_path, **settings).train()
