import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from mentor_trl.experts.compatibility import text_model
from mentor_trl.rollout.local import decoder as decoder_module
from mentor_trl.rollout.local.decoder import Decoder, inference
from mentor_trl.rollout.local.decoding_check import check_decoding
from statistics_helpers import forward_logps, make_peaked_model


VOCABULARY = 12
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def without(settings, name):
    return {key: value for key, value in settings.items() if key != name}


GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
FALCON = {key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
MODELS = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SHAPE)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**SHAPE)),
    "qwen2-window": (
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**SHAPE)),
    "mistral-window": (MistralForCausalLM, lambda: MistralConfig(**SHAPE, sliding_window=4)),
    "phi3-window": (Phi3ForCausalLM, lambda: Phi3Config(**without(SHAPE, "head_dim"), sliding_window=4)),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda: Gemma2Config(
            **SHAPE,
            sliding_window=4,
            query_pre_attn_scalar=8,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,
        ),
    ),
    "gemma3": (Gemma3ForCausalLM, lambda: Gemma3TextConfig(**SHAPE, sliding_window=4, query_pre_attn_scalar=8)),
    "granite": (GraniteForCausalLM, lambda: GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "cohere": (CohereForCausalLM, lambda: CohereConfig(**SHAPE, logit_scale=0.25)),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(**GPT2)),
    "gpt-neox": (GPTNeoXForCausalLM, lambda: GPTNeoXConfig(**SHAPE)),
    "falcon": (FalconForCausalLM, lambda: FalconConfig(**FALCON)),
    "falcon-grouped": (FalconForCausalLM, lambda: FalconConfig(**FALCON, **GROUPED)),
    "stablelm": (StableLmForCausalLM, lambda: StableLmConfig(**SHAPE)),
}
SAMPLED = ["llama", "qwen2", "qwen2-window", "mistral-window", "gemma2", "gemma3", "gpt2"]


def make_model(name, seed=0, attention=None, **changes):
    model_class, make_config = MODELS[name]
    config = make_config()
    for key, value in changes.items():
        setattr(config, key, value)
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def random_ids(rows, length, seed=0, vocab_size=VOCABULARY):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_in_ragged_steps_equals_the_model(name, attention):
    """Prompts of different lengths, steps of different widths, and a roll-back over wrong tokens."""
    model = make_model(name, attention=attention)
    ids = random_ids(3, 14)
    with inference(model):
        actual = decode_in_steps(Decoder(model, slots=3), ids)
    expected = forward_logps(model, ids)
    assert len(actual) > 24
    for (row, position), logps in actual.items():
        torch.testing.assert_close(logps, expected[row, position], rtol=0, atol=1e-4)


def decode_in_steps(decoder, ids):
    """Log-probabilities of each (row, position) behind the prompts."""
    lengths = torch.tensor([3, 9, 1])
    decoder.prefill([0, 1, 2], [tuple(ids[row, :length].tolist()) for row, length in enumerate(lengths)])
    seen, actual = lengths - 1, {}
    for step, width in enumerate((1, 3, 2, 4)):
        positions = seen.unsqueeze(1) + torch.arange(width)
        positions = positions.clamp(max=13)
        true, wrong = ids.gather(1, positions), (ids.gather(1, positions) + 1) % VOCABULARY
        if step % 2:
            decoder.forward(wrong, positions, 3, int(positions.max()) + 1)
        hidden = decoder.forward(true, positions, 3, int(positions.max()) + 1)
        logps = decoder.logits(hidden.flatten(0, 1)).double().log_softmax(-1).view(3, width, -1)
        for row in range(3):
            for k in range(width):
                if seen[row] + k < 14:
                    actual[row, int(seen[row]) + k] = logps[row, k]
        seen = (seen + width).clamp(max=13)
    return actual


def test_windows_and_caps_matter_in_these_models():
    """Else the test above would not see them ignored."""
    ids = random_ids(3, 14)
    for name, changes in [
        ("mistral-window", {"sliding_window": 64}),
        ("qwen2-window", {"sliding_window": 64}),
        ("phi3-window", {"sliding_window": 64}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 64}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ]:
        other = make_model(name, **changes)
        assert (forward_logps(make_model(name), ids) - forward_logps(other, ids)).abs().max() > 0.05, (name, changes)
    capped = make_model("gemma2", attention="eager")
    other = make_model("gemma2", attention="eager", attn_logit_softcapping=None)
    assert (forward_logps(capped, ids) - forward_logps(other, ids)).abs().max() > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_transformers_are_accepted(name):
    model = make_model(name).train()
    assert check_decoding(model, "policy").ragged
    assert model.training and all(module.training for module in model.modules())


def test_tied_and_bfloat16_models_are_accepted():
    check_decoding(make_model("qwen2", tie_word_embeddings=True), "policy")
    check_decoding(make_model("llama").bfloat16(), "expert")


def test_unknown_logits_are_refused():
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3.0
            return output

    odd = Odd(make_model("llama").config).eval()
    with pytest.raises(ValueError, match="makes its logits .* in a way that is not known"):
        check_decoding(odd, "policy")


def count_positions(model):
    """Forward passes of the model inside: the shapes of their input ids."""
    shapes = []
    text_model(model).base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.fixture
def peaked():
    model = make_peaked_model(0, vocab_size=6)
    with torch.no_grad(), inference(model):
        yield model


def test_prefill_computes_each_prompt_once(peaked):
    shapes = count_positions(peaked)
    decoder = Decoder(peaked, slots=5)
    a, b, c = (1, 2, 3, 4), (4, 3, 2, 1), (5, 5, 1, 2)
    decoder.prefill([0, 1, 2, 3], [a, b, a, b])
    assert shapes == [(2, 3)]
    for buffer in decoder.cache.keys + decoder.cache.values:
        assert torch.equal(buffer[0, :3], buffer[2, :3]) and torch.equal(buffer[1, :3], buffer[3, :3])
        assert not torch.equal(buffer[0, :3], buffer[1, :3])
    # held by a slot: copied, also when that slot takes another prompt at the same time
    before = [buffer.clone() for buffer in decoder.cache.keys]
    decoder.prefill([0, 1, 2, 3], [b, a, b, a])
    assert shapes == [(2, 3)]
    for buffer, old in zip(decoder.cache.keys, before):
        assert torch.equal(buffer[[1, 0, 3, 2], :3], old[:4, :3])
    decoder.prefill([4, 0], [c, c])
    assert shapes == [(2, 3), (1, 3)]
    decoder.prefill([4, 0, 1], [c, c, a])
    assert shapes == [(2, 3), (1, 3)]


def test_prefill_in_chunks_of_similar_length(monkeypatch, peaked):
    monkeypatch.setattr(decoder_module, "MAX_PREFILL_TOKENS", 16)
    shapes = count_positions(peaked)
    decoder = Decoder(peaked, slots=6)
    ids = random_ids(6, 20, vocab_size=6)
    lengths = [2, 20, 3, 8, 1, 7]
    prompts = [tuple(ids[row, :length].tolist()) for row, length in enumerate(lengths)]
    decoder.prefill(list(range(6)), prompts)
    # the longest alone, then 8 and 7 together, then the others; a prompt of one token needs nothing
    assert shapes == [(1, 19), (2, 7), (3, 2)]
    positions = torch.tensor(lengths).unsqueeze(1) - 1
    hidden = decoder.forward(ids.gather(1, positions), positions, 6, 20)
    actual = decoder.logits(hidden[:, 0]).double().log_softmax(-1)
    for row, prompt in enumerate(prompts):
        expected = forward_logps(make_peaked_model(0, vocab_size=6), torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(actual[row], expected, rtol=0, atol=1e-4)


def test_moved_slots_carry_their_prompt(peaked):
    shapes = count_positions(peaked)
    decoder = Decoder(peaked, slots=3)
    a, b = (1, 2, 3, 4), (4, 3, 2, 1)
    decoder.prefill([0, 1], [a, b])
    decoder.move([1], [0], 4)
    decoder.prefill([0, 2], [b, a])
    assert shapes == [(2, 3), (1, 3)]  # a is held no more
    decoder.move([1], [2], 4)
    decoder.prefill([2], [b])
    assert shapes == [(2, 3), (1, 3)]


def test_inference_mode_is_undone():
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()  # nested modes
    model.config._attn_implementation = "flash_attention_2"
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    with pytest.raises(RuntimeError, match="inside"), inference(model):
        assert not any(module.training for module in model.modules())
        assert model.config._attn_implementation != "flash_attention_2"
        raise RuntimeError("inside")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = "eager"
    with inference(model):
        assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_half_precision_logits_are_float32():
    model = make_model("llama").bfloat16()
    decoder = Decoder(model, slots=1)
    with inference(model):
        hidden = decoder.forward(torch.tensor([[3]]), torch.tensor([[0]]), 1, 1)
    assert hidden.dtype == torch.bfloat16
    assert decoder.logits(hidden[:, 0]).dtype == torch.float32


@torch.no_grad()
def test_peft_models_keep_their_adapters():
    torch.manual_seed(0)
    base = make_model("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    ids = random_ids(1, 6)
    decoder = Decoder(model, slots=1)
    with inference(model):
        hidden = decoder.forward(ids, torch.arange(6).unsqueeze(0), 1, 6)
    actual = decoder.logits(hidden[0]).double().log_softmax(-1)
    torch.testing.assert_close(actual, forward_logps(model, ids)[0], rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (actual - forward_logps(model, ids)[0]).abs().max() > 0.1
    check_decoding(model, "policy")
