"""What only a CUDA device can show: devices, half precision and its kernels."""

import pytest
import torch

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import LocalSampler, MixedRequest
from trainer_helpers import make_trainer


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_are_those_of_a_forward_pass(dtype: torch.dtype):
    policy = make_tiny_model(seed=0).to("cuda", dtype)
    expert = make_tiny_model(seed=1).to("cuda", dtype)
    prompts = [[4, 5, 6], [7, 8], [9]] * 4
    request = MixedRequest(prompts, [2.0] * len(prompts), 24, (2,), seed=3)
    with LocalSampler(expert, rollout_batch_size=5, draft_length=4).session(policy) as session:
        rollout = session.sample(request)
    tolerance = 1e-3 if dtype == torch.float32 else 0.25
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + rollout.completion_ids[row]], device="cuda")
        with torch.no_grad():
            logps = policy(ids).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = logps.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1).cpu()
        torch.testing.assert_close(rollout.logps[row, : len(expected)], expected, rtol=0, atol=tolerance)
    assert rollout.branch.any() and rollout.replaced.any()


def test_training_in_bfloat16_with_an_expert_of_another_type(tmp_path):
    trainer = make_trainer(
        tmp_path,
        use_cpu=False,
        bf16=True,
        max_steps=2,
        trainer_kwargs={"expert": make_tiny_model(seed=1).half(), "expert_processing_class": make_tiny_tokenizer()},
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.vllm
@pytest.mark.shared_engine
def test_a_colocated_engine_sleeps_and_wakes_with_its_expert(tmp_path):
    for name, seed in (("policy", 0), ("expert", 1)):
        make_tiny_model(seed=seed, hidden_size=256).save_pretrained(tmp_path / name)
        make_tiny_tokenizer().save_pretrained(tmp_path / name)
    trainer = make_trainer(
        tmp_path,
        use_cpu=False,
        bf16=True,
        max_steps=3,
        model=str(tmp_path / "policy"),
        expert_model_name_or_path=str(tmp_path / "expert"),
        trainer_kwargs={"expert": None},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.2,
        vllm_max_model_length=128,
    )
    sampler = trainer.vllm_generation.sampler
    digest = lambda model: sampler.llm.collective_rpc("mentor_digest", args=(model,))[0]
    with sampler.session():
        expert, policy = digest("expert"), digest("policy")
    trainer.train()
    with sampler.session():
        assert digest("expert") == expert and digest("policy") != policy
