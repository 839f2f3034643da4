"""Tiny models whose state cannot be rolled back, and others that cannot be decoded row by row."""

import torch
import transformers as tf


SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
MAMBA2 = {"state_size": 8, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}
FALCON_H1 = {
    "head_dim": 8,
    "mamba_d_ssm": 16,
    "mamba_n_heads": 2,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "lm_head_multiplier": 0.5,
}
STATE = {"hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.4, "tie_word_embeddings": False}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.4, "window_size": 4}
JAMBA = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
MODELS = {
    "qwen3-next": (tf.Qwen3NextForCausalLM, tf.Qwen3NextConfig, {**SHAPE, **LINEAR, **EXPERTS}),
    "qwen3.5": (tf.Qwen3_5ForCausalLM, tf.Qwen3_5TextConfig, {**SHAPE, **LINEAR}),
    "mamba2": (tf.Mamba2ForCausalLM, tf.Mamba2Config, {**STATE, **MAMBA2}),
    "lfm2": (tf.Lfm2ForCausalLM, tf.Lfm2Config, {**SHAPE, "layer_types": ["conv", "full_attention"]}),
    "falcon-h1": (tf.FalconH1ForCausalLM, tf.FalconH1Config, {**SHAPE, **FALCON_H1}),
    "bloom": (tf.BloomForCausalLM, tf.BloomConfig, BLOOM),
    "mamba": (tf.MambaForCausalLM, tf.MambaConfig, {**STATE, "state_size": 4}),
    "jamba": (tf.JambaForCausalLM, tf.JambaConfig, {**SHAPE, **JAMBA}),
    "gpt-neo": (tf.GPTNeoForCausalLM, tf.GPTNeoConfig, {**NEO, "attention_types": [[["global"], 2]]}),
    "gpt-neo-local": (tf.GPTNeoForCausalLM, tf.GPTNeoConfig, {**NEO, "attention_types": [[["local"], 2]]}),
    "rwkv": (tf.RwkvForCausalLM, tf.RwkvConfig, {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}),
    "recurrent-gemma": (
        tf.RecurrentGemmaForCausalLM,
        tf.RecurrentGemmaConfig,
        {**SHAPE, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 64, "w_init_variance_scale": 0.5},
    ),
}
JUDGED = ["qwen3-next", "qwen3.5", "mamba2", "lfm2", "falcon-h1", "bloom"]


def make_recurrent(name: str, seed: int = 0, vocab_size: int = 4):
    """A model whose next-token distributions are far from uniform, and far from those of another seed."""
    model_class, config_class, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(vocab_size=vocab_size, **settings)).eval()
