"""Loading experts, and whether they can speak inside the policy's rollouts."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MambaConfig, Phi3Config
from transformers.integrations import deepspeed as hf_deepspeed

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig, load_expert
from mentor_trl.errors import SetupError
from mentor_trl.experts.compatibility import (
    check_context,
    check_stop_tokens,
    check_vocabulary,
    context_length,
    stop_token_ids,
)
from mentor_trl.experts.load import expert_name, load_expert_tokenizer, replicated_loading, resolve_expert
from mentor_trl.random_state import untouched_rng
from trainer_helpers import SETTINGS


@pytest.fixture
def adapter(tmp_path, tiny_expert_dir):
    """Adapter on the tiny expert, and its folder, which holds no tokenizer."""
    base = make_tiny_model(seed=1)
    base.name_or_path = base.config._name_or_path = str(tiny_expert_dir)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_loaded_expert_is_frozen(tiny_expert_dir):
    expert = load_expert(str(tiny_expert_dir))
    assert not expert.training and not any(p.requires_grad for p in expert.parameters())
    assert expert.dtype == torch.float32
    for name, value in make_tiny_model(seed=1).state_dict().items():
        assert torch.equal(expert.state_dict()[name], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype, tiny_expert_dir):
    assert load_expert(str(tiny_expert_dir), dtype=dtype).dtype == getattr(torch, dtype)


def test_init_kwargs_reach_the_model(tiny_expert_dir):
    args = MentorGRPOConfig(
        "unused", expert_model_init_kwargs={"attn_implementation": "eager"}, expert_dtype="bfloat16", **SETTINGS
    )
    expert, tokenizer, name = resolve_expert(str(tiny_expert_dir), None, args)
    assert expert.config._attn_implementation == "eager" and expert.dtype == torch.bfloat16
    assert name == str(tiny_expert_dir) and len(tokenizer) == 64


def test_an_adapter_is_merged(adapter):
    model, folder = adapter
    expert = load_expert(str(folder))
    assert not isinstance(expert, PeftModel)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(expert(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert len(load_expert_tokenizer(str(folder))) == 64  # that of its base


def test_a_given_adapter_stays_one(adapter, tiny_expert_dir):
    model, _ = adapter
    expert, tokenizer, name = resolve_expert(model, None, MentorGRPOConfig("unused", **SETTINGS))
    assert expert is model and not any(p.requires_grad for p in model.parameters())
    assert name == expert_name(model) == str(tiny_expert_dir) and len(tokenizer) == 64


def test_random_states_are_left_alone_even_by_errors():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(RuntimeError), untouched_rng():
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_an_expert_is_not_sharded(monkeypatch):
    """Under ZeRO-3 transformers shards whatever is loaded while this reference is set."""
    mark = lambda: None
    monkeypatch.setattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", mark)
    with replicated_loading():
        assert hf_deepspeed._hf_deepspeed_config_weak_ref is None
    assert hf_deepspeed._hf_deepspeed_config_weak_ref is mark


def test_vocabularies_with_padded_embeddings():
    tokenizer = make_tiny_tokenizer()
    check_vocabulary(make_tiny_model(), make_tiny_model(vocab_size=80), tokenizer, make_tiny_tokenizer())
    check_vocabulary(make_tiny_model(vocab_size=72), make_tiny_model(), tokenizer, make_tiny_tokenizer())


def test_an_added_token_is_a_difference():
    other = make_tiny_tokenizer()
    other.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"1 of 65 ids differ \(policy / expert\): id 64: None / '<think>'"):
        check_vocabulary(make_tiny_model(), make_tiny_model(vocab_size=65), make_tiny_tokenizer(), other)


def test_stop_tokens_come_from_everywhere():
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    assert stop_token_ids(model, tokenizer) == [2]
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 2], 6
    assert stop_token_ids(model, tokenizer) == [5, 2, 6]
    model.generation_config = None
    assert stop_token_ids(model, tokenizer) == [6, 2]


def test_the_stop_set():
    expert, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    assert check_stop_tokens([2, 6], expert, tokenizer) == [2, 6]  # an expert may end with fewer
    expert.generation_config.eos_token_id = [2, 5]
    with pytest.raises(
        ValueError, match=r"5 \('<user>'\); the policy stops at \[2, 6\]. Set `extend_stop_tokens=True`"
    ):
        check_stop_tokens([2, 6], expert, tokenizer)
    assert check_stop_tokens([2, 6], expert, tokenizer, extend=True) == [2, 6, 5]


def test_context_length():
    assert context_length(make_tiny_model().config) == 2048
    assert context_length(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)) is None
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    # Beyond it every token, cached ones too, would turn by other frequencies
    assert context_length(Phi3Config(**phi, original_max_position_embeddings=64, rope_parameters=rope)) == 64


def test_what_does_not_fit_a_context():
    check_context([3, 48], 2000, 2048, "the policy's")
    check_context([10**6], 10**6, None, "the policy's")
    with pytest.raises(SetupError) as refused:
        check_context([3, 49], 2000, 2048, "the policy's", "choose another policy")
    assert str(refused.value) == (
        "A prompt of 49 tokens (row 1) and `max_completion_length=2000` exceed the policy's context of 2048 tokens. "
        "To fit, lower `max_completion_length` to 1999 or less, drop prompts of more than 48 tokens, or choose "
        "another policy."
    )
    with pytest.raises(SetupError, match=r"To fit, lower `max_completion_length` to 43 or less\.$"):
        check_context([5], 48, 48, "the policy's")
    # A prompt that leaves no room is not cured by a shorter completion
    with pytest.raises(SetupError, match=r"To fit, drop prompts of more than 40 tokens\.$"):
        check_context([50], 8, 48, "the engine's")
    with pytest.raises(SetupError, match=r"To fit, shorten both\.$"):
        check_context([50], 60, 48, "the engine's")
