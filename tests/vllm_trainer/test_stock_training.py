"""Stock servers over HTTP: two replicas of the policy, and the expert on a server of its own."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_server_training import share_of_letters

from helpers import make_tiny_tokenizer
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import ServerError, WrongServer
from mentor_trl.experts.remote import RemoteExpert
from mentor_trl.objective import sentence_endings
from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.serving.adapters import write_adapter
from mentor_trl.rollout.serving.weights import write_weights
from mentor_trl.rollout.stock.replicas import PolicyReplicas
from mentor_trl.rollout.stock.stock_sampler import StockSampler
from statistics_helpers import Tree, forward_logps, misfit, sequences
from trainer_helpers import RecordingTrainer, make_trainer, prompts, tiny


pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PATIENCE = Patience(read=60.0, back_off=0.2, recovery=240.0)
BRANCH_ID = 6  # all 64 rows of the vocabulary are tokens, and this special one is given up to mark branch points


@pytest.fixture
def sampler(servers):
    first, second, expert = servers
    policy = PolicyReplicas([first.url, second.url], num_tokens=64, patience=PATIENCE)
    return StockSampler(policy, RemoteExpert(expert.url, make_tiny_tokenizer(), patience=PATIENCE))


def requests(rows: int, **options) -> MixedRequest:
    given = [[1, 9, 20, 31], [1, 12], [1, 33, 34, 40, 41, 50, 20, 8]]
    settings = {"max_new_tokens": 16, "stop_token_ids": (2,), "seed": 5, **options}
    return MixedRequest([given[row % 3] for row in range(rows)], [1.5 + row % 2 for row in range(rows)], **settings)


class Masked(torch.nn.Module):
    """A policy whose branch id is never sampled."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **kwargs):
        output = self.model(**kwargs)
        output.logits[..., BRANCH_ID] = -torch.inf
        return output


def check_logps(rollout, request, policy, expert, tolerance=2e-3):
    """What is recorded are log-probabilities of these weights, and of no others."""
    for row, (prompt, ids) in enumerate(zip(request.prompt_ids, rollout.completion_ids)):
        where, index = slice(len(prompt) - 1, len(prompt) + len(ids) - 1), torch.tensor(ids).unsqueeze(1)
        branch = rollout.branch[row, : len(ids)]
        for name, model, here in (("logps", policy, ~branch), ("expert_logps", expert, branch)):
            due = forward_logps(model, torch.tensor([prompt + ids]), request.temperature)[0, where]
            due = due.gather(1, index)[:, 0].float().where(here, torch.nan)
            found = getattr(rollout, name)[row, : len(ids)]
            what = f"{name} of row {row}: {found.tolist()} and not {due.tolist()}"
            torch.testing.assert_close(found, due, atol=tolerance, rtol=0, equal_nan=True, msg=what)


@pytest.mark.parametrize("rule", ["entropy", "sentence"])
def test_joint_distribution_over_http(rule, sampler):
    """1,500 rows over two replicas; the same test rejects the policy and the expert alone."""
    endings = tuple(sentence_endings(make_tiny_tokenizer()))
    options = {"branch_rule": rule, "share": 0.5, "span": 2, "sentence_ids": endings if rule == "sentence" else ()}
    request = replace(requests(1500, max_new_tokens=2, **options), gamma=[4.0] * 1500)
    request = replace(request, prompt_ids=[[*ids, endings[0]] for ids in request.prompt_ids])
    sampler.policy.check_sentences(endings)
    rows = sequences(sampler.sample(request))
    trees = [Tree(Masked(tiny(0)), tiny(1), request, row) for row in range(3)]
    law = lambda kind: misfit((rows[row::3], getattr(tree, kind)()) for row, tree in enumerate(trees))
    assert law("mixed") <= 1.0
    assert min(law("policy"), law("expert")) > 1.5
    assert {place.url for place in sampler.policy._places.values()} == {s.url for s in sampler.policy.servers}


def adapter(seed: int):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tiny(0), config)


def test_adapters_take_each_others_place(servers, sampler, tmp_path):
    """Rows follow the new adapter though their prefixes are cached; the base and the expert stay as they were."""
    request = requests(12)
    request = replace(request, prompt_ids=[5 * [9, 20, 31, 12, 8, 40, 7, 33] + ids for ids in request.prompt_ids])
    base = sampler.sample(request)
    for number in (1, 2):
        model = adapter(number)
        write_adapter(model, tmp_path / f"a{number}")
        for server in sampler.policy.servers:
            server.load_adapter(str(tmp_path / f"a{number}"), f"a{number}")
        with sampler.session() as session:
            rollout = session.sample(request)
        check_logps(rollout, request, Masked(model.eval()), tiny(1), tolerance=5e-3)
        assert rollout.completion_ids != base.completion_ids
    for server in sampler.policy.servers:
        assert server._models() == [server.served_name, "a2"]
        server.model_name = server.served_name
    check_logps(sampler.sample(request), request, Masked(tiny(0)), tiny(1))
    former = sampler.policy.servers[0]
    former.info = former.info | {"weights_version": "v7"}  # as an earlier run may have left it
    with pytest.raises(WrongServer, match="'v7'.*Restart it"):
        former.load_adapter(str(tmp_path / "a1"), "a1")
    sent = sum(file.stat().st_size for file in (tmp_path / "a2").iterdir())
    assert sent < 0.2 * sum(p.numel() * 4 for p in tiny(0).parameters())


def trainer_of(folder, folders, servers=None, **settings):
    if servers is None:
        settings["expert_model_name_or_path"] = folders[1]
    else:
        urls = f"{servers[0].url}, {servers[1].url}"
        served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": urls}
        served |= {"expert_base_url": servers[2].url, "vllm_server_timeout": 240.0, "vllm_read_timeout": 60.0}
        settings = served | settings
    return make_trainer(
        folder,
        cls=RecordingTrainer,
        model=folders[0],
        reward_funcs=share_of_letters,
        train_dataset=prompts(400),
        trainer_kwargs={"expert": None, **settings.pop("trainer_kwargs", {})},
        **{"learning_rate": 2e-3, "per_device_train_batch_size": 32, **settings},
    )


def test_training_an_adapter_on_servers_of_its_base(folders, servers, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(
        tmp_path, folders, servers, max_steps=3, vllm_weight_sync="adapter", trainer_kwargs={"peft_config": config}
    )
    trainer.train()
    off = [logs["sampling/sampling_logp_difference/mean"] for logs in trainer.state.log_history if "reward" in logs]
    assert max(off) < 0.1 and len(off) == 3
    names = [server._models()[-1] for server in trainer.vllm_generation.servers]
    assert names[0] == names[1] != trainer.vllm_generation.servers[0].served_name


def test_servers_that_are_killed_in_mid_batch(servers, sampler, folders, tmp_path):
    """A replica and the expert, with weights that came later: rows are those of an undisturbed run."""
    weights = tiny(7)
    write_weights(weights.state_dict().items(), tmp_path / "v1")
    for server in sampler.policy.servers:
        server.load_policy(str(tmp_path / "v1"), "v1")
    request = requests(48, branch_rule="random", share=0.3)
    with sampler.session() as session:
        whole = session.sample(request)
    check_logps(whole, request, Masked(weights), tiny(1))

    def strike():
        time.sleep(0.3)
        for server in (servers[0], servers[2]):
            server.kill()
            server.start()

    thread = threading.Thread(target=strike)
    thread.start()
    with sampler.session() as session:
        rollout = session.sample(request)
    thread.join()
    check_logps(rollout, request, Masked(weights), tiny(1))
    same = sum(map(list.__eq__, rollout.completion_ids, whole.completion_ids))
    assert same >= 46, same  # a batch of another size rounds otherwise, and now and then a draw falls elsewhere
    assert [server.info["weights_version"] for server in sampler.policy.servers] == ["v1", "v1"]


def test_learns_like_the_engine_in_process(folders, servers, tmp_path):
    """Three seeds, random positions at a share of .3; by the end means of rewards differ by less than 0.1."""
    curves, options = {}, {"max_steps": 20, "branch_rule": "random", "branch_share": 0.3}
    options["entropy_threshold_from"] = "previous"
    for name, where in (("local", None), ("stock", servers)):
        runs = []
        for seed in (1, 2, 3):
            trainer = trainer_of(tmp_path / f"{name}{seed}", folders, where, seed=seed, **options)
            trainer.train()
            runs.append([batch["rewards"][~batch["guided"]].mean().item() for batch in trainer.batches])
        curves[name] = [sum(values) / 3 for values in zip(*runs, strict=True)]
    last = {name: sum(curve[-5:]) / 5 for name, curve in curves.items()}
    assert all(last[name] > curve[0] + 0.2 for name, curve in curves.items()), curves
    assert abs(last["stock"] - last["local"]) < 0.1, curves
    history = [logs for logs in trainer.state.log_history if "reward" in logs]
    assert all("mentor/acceptance" not in logs and 0.15 < logs["mentor/branch_rate"] < 0.45 for logs in history)


def test_log_probabilities_at_branch_points_are_the_training_models(folders, servers, tmp_path):
    trainer = trainer_of(tmp_path, folders, servers, max_steps=2)
    trainer.train()
    for batch in trainer.batches:
        rollout = batch["rollout"]
        ours = batch["old_per_token_logps"][batch["guided"]]
        known = rollout.logps[:, : ours.size(1)]
        torch.testing.assert_close(known[rollout.branch], ours[:, : known.size(1)][rollout.branch])
    # Training normalizes over the branch id as well, which the engine never samples
    off = [logs["sampling/sampling_logp_difference/mean"] for logs in trainer.state.log_history if "reward" in logs]
    assert max(off) < 0.1


def test_an_expert_that_stays_dead_ends_the_run_with_a_checkpoint(folders, servers, tmp_path):
    settings = {"max_steps": 3, "vllm_server_timeout": 5.0}
    trainer = trainer_of(tmp_path, folders, servers, **settings)
    sync = trainer.vllm_generation.sync_weights

    def killing():
        if trainer.state.global_step == 2:
            servers[2].kill()
        sync()

    trainer.vllm_generation.sync_weights = killing
    with pytest.raises(ServerError, match=servers[2].url), pytest.warns(UserWarning, match="checkpoint-2"):
        trainer.train()
    servers[2].start()
    servers[2].wait_until_ready()
    resumed = trainer_of(tmp_path, folders, servers, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3 and len(resumed.batches) == 1
