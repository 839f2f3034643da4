"""Builders of tiny models and tokenizers, shared by the tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)


SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "<sys>", "<user>", "<bot>"]
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=.,:?!#%()<>{}\\\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'system': '<sys>', 'user': '<user>', 'assistant': '<bot>'}[message['role']] + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def make_tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token a character (unknown ones become `<unk>`), 64 tokens in all."""
    vocabulary = SPECIAL_TOKENS + list(CHARACTERS)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE if chat_template else None
    return fast


def make_tiny_model(
    vocab_size: int = 64, seed: int = 0, hidden_size: int = 32, layers: int = 2, arch: str = "llama"
) -> PreTrainedModel:
    """A randomly initialised decoder on the CPU in float32; equal arguments give equal weights."""
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[
        arch
    ]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        # The default of .02 gives nearly uniform next tokens, on which most mistakes cannot be seen.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def make_letter_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """One token a letter; the first is the end of a text."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=letters[0], unk_token=letters[0], pad_token=letters[0]
    )
