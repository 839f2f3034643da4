"""A trainer whose policy is sampled in this process, and whose expert is asked on a server."""

import pytest
import torch

from fake_server import serving
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.connection.failures import ServerError
from mentor_trl.errors import SetupError
from stock_server import StockServer
from trainer_helpers import RecordingTrainer, history, make_trainer, weights


@pytest.fixture
def stock():
    return StockServer(make_tiny_model(seed=1), make_tiny_tokenizer(), stops=(2,))


@pytest.fixture
def url(stock):
    with serving(stock) as address:
        yield address


def remote_trainer(folder, url, **settings):
    options = {"vllm_server_timeout": 0.5, "vllm_read_timeout": 10.0, "trainer_kwargs": {"expert": None}}
    return make_trainer(
        folder, cls=RecordingTrainer, **{"expert_base_url": url, "max_steps": 3, **options, **settings}
    )


def test_expert_tokens_are_those_of_the_server(url, stock, tmp_path):
    trainer = remote_trainer(tmp_path, url, temperature=0.7)
    trainer.train()
    assert trainer.engine.remote and trainer.engine.expert_name == "hub/expert"
    tokens = 0
    for batch in trainer.batches:
        rollout = batch["rollout"]
        row, at = rollout.branch.nonzero(as_tuple=True)
        prompts = batch["prompt_ids"][batch["guided"]], batch["prompt_mask"][batch["guided"]].bool()
        for r, t in zip(row.tolist(), at.tolist()):
            prefix = prompts[0][r][prompts[1][r]].tolist() + rollout.completion_ids[r][:t]
            logs = (stock.next_logits(prefix) / 0.7).log_softmax(-1)[rollout.completion_ids[r][t]]
            assert rollout.expert_logps[r, t].item() == pytest.approx(logs.item(), abs=1e-3)
        tokens += len(row)
    assert tokens and trainer.engine.expert.traffic["requests"] > tokens
    logged = [logs for logs in trainer.state.log_history if "reward" in logs]
    assert all(0.0 <= logs["mentor/acceptance"] <= 1.0 for logs in logged)


@pytest.mark.parametrize("source", ["previous", "current"])
def test_a_lost_expert_leaves_a_checkpoint_that_goes_on_to_the_same_numbers(source, url, stock, tmp_path):
    settings = {"max_steps": 4, "entropy_threshold_from": source}
    whole = remote_trainer(tmp_path / "whole", url, **settings)
    whole.train()
    cut = remote_trainer(tmp_path / "cut", url, **settings)
    generate = cut._generate_single_turn

    def failing(*args, **kwargs):
        if cut.state.global_step == 2:
            stock.script["/v1/completions"] = [503] * 10**4
        return generate(*args, **kwargs)

    cut._generate_single_turn = failing
    with pytest.raises(ServerError), pytest.warns(UserWarning, match="checkpoint-2"):
        cut.train()
    stock.script.clear()
    resumed = remote_trainer(tmp_path / "cut", url, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert history(resumed, ("train_loss",))[-3:] == history(whole, ("train_loss",))[-3:]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_model_name_or_path": "org/expert"}, "given twice"),
        ({"expert_dtype": "bfloat16"}, "`expert_dtype='bfloat16'` applies to an expert that this process loads"),
        ({"correction_level": "mixture"}, "asked at branch points only"),
        ({"vllm_policy_server_base_url": "http://127.0.0.1:1"}, "separated by commas"),
        ({"expert_base_url": "nowhere"}, "not the address of a server"),
        ({"max_completion_length": 64}, "the expert's context of 64 tokens"),
        ({"expert_base_url": None, "vllm_weight_sync": "adapter"}, "needs a policy that is served alone"),
        ({"branch_share": 0.5}, "has no meaning for `branch_rule='entropy'`"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_structured_outputs_regex": "a"}, "structured_outputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_go_with_an_expert_on_a_server(settings, message, url, tmp_path):
    with pytest.raises((SetupError, ValueError), match=message):
        remote_trainer(tmp_path, url, **settings)


def test_an_expert_cannot_be_given_beside_its_server(url, tmp_path):
    with pytest.raises(SetupError, match="given twice"):
        remote_trainer(tmp_path, url, trainer_kwargs={"expert": make_tiny_model(seed=1)})


def test_stop_ids_of_the_server_are_the_policys(stock, tmp_path):
    stock.stops = (2, 1)
    with serving(stock) as url:
        with pytest.raises(SetupError, match="'<bos>'"):
            remote_trainer(tmp_path, url)
        trainer = remote_trainer(tmp_path, url, extend_stop_tokens=True)
        assert trainer.eos_token_ids == [2, 1]
