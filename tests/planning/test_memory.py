import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from helpers import make_tiny_model
from mentor_trl.errors import SetupError
from mentor_trl.planning.choices import NUM_GENERATIONS, accumulation, first_load, fit, sparing
from mentor_trl.planning.hardware import Hardware, find_hardware
from mentor_trl.planning.memory import FOUR_BIT, GIB, Load, room
from mentor_trl.planning.models import ModelFacts, read_model


def on_meta(hidden: int, layers: int, vocabulary: int = 32_000) -> ModelFacts:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelFacts("model", model, None, model.num_parameters(), 2.0)


LARGE = on_meta(4096, 24)  # 6.7B weights


def test_what_a_model_is_read_as(tiny_model_dir):
    facts, model = read_model(str(tiny_model_dir), "policy"), make_tiny_model()
    assert facts.parameters == sum(one.numel() for one in model.parameters())
    assert facts.model.device.type == "meta" and facts.checkpoint_bytes == 4 and facts.context == 2048
    cache = DynamicCache()
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert facts.cached_numbers * 3 == sum(one.keys.numel() + one.values.numel() for one in cache.layers)


def test_parts_are_those_of_a_step(tiny_model_dir):
    model, facts = make_tiny_model(), read_model(str(tiny_model_dir), "policy")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    parts = Load(facts, facts, prompt=3, completion=5, rows=4, expert_bytes=2.0).parts()
    size = lambda tensors: sum(one.numel() * one.element_size() for one in tensors)
    assert parts["policy"] == size(model.parameters())
    assert parts["gradients"] == size(one.grad for one in model.parameters())
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["optimizer"] == size(states)
    assert parts["expert"] == facts.parameters * 2 and parts["caches"] == 4 * 8 * 2 * facts.cached_numbers * 2


def test_the_peak_is_the_larger_of_two_moments():
    load = Load(LARGE, LARGE, prompt=100, completion=1000, rows=1, batch=1)
    parts = load.parts()
    standing = parts["policy"] + parts["optimizer"] + parts["expert"]
    assert load.peak() == standing + parts["gradients"] + parts["activations"]
    many = load.but(rows=1000)
    assert many.peak() == standing + many.parts()["caches"] > load.peak()
    engine = 10 * GIB
    assert load.but(engine=engine).peak() == load.peak() + engine
    assert load.but(engine=engine, engine_sleeps=True).peak() == load.peak()
    assert load.but(reference=True).peak() == load.peak() + parts["policy"]


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"lora": 32}, {"shards": 4}, {"expert_bytes": FOUR_BIT}])
def test_what_spares_memory(change):
    load = Load(LARGE, LARGE, prompt=100, completion=1000)
    assert load.but(**change).peak() < load.peak()


@pytest.mark.parametrize(
    ("gpus", "memory", "words"),
    [
        (1, 192, ["passes of 8 rows"]),
        (1, 80, ["LoRA of rank 32"]),
        (8, 80, ["ZeRO-2 over 8 GPUs"]),
        (1, 28, ["LoRA of rank 32", "expert in 4 bits"]),
        (1, 24, ["LoRA of rank 32", "policy in 4 bits", "expert in 4 bits"]),
    ],
)
def test_the_plainest_settings_that_fit(gpus, memory, words):
    hardware = Hardware(gpus, memory)
    load, limit = fit(first_load(LARGE, LARGE, 200, 1000, hardware), hardware)
    assert load.peak() <= limit == room(memory)
    assert sparing(load)[: len(words)] == words


def test_too_small_a_device_gets_the_most_sparing_settings():
    hardware = Hardware(1, 6)
    load, limit = fit(first_load(LARGE, LARGE, 200, 1000, hardware), hardware)
    assert load.peak() > limit and (load.batch, load.rows, load.policy_bytes) == (1, 8, FOUR_BIT)


@pytest.mark.parametrize("gpus", [0, 1, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("prompts", [1, 5, 1000])
def test_steps_are_of_whole_groups(gpus, batch, prompts):
    hardware = Hardware(gpus, 80)
    rows = batch * hardware.processes * accumulation(Load(LARGE, None, 1, 1, batch=batch), hardware, prompts)
    assert rows % NUM_GENERATIONS == 0
    assert rows <= max(64, NUM_GENERATIONS * hardware.processes)
    assert gpus > 1 or rows <= NUM_GENERATIONS * prompts


def test_hardware(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert find_hardware().gpus == find_hardware(0).gpus == 0
    assert str(find_hardware(2, 80)) == "2 GPUs of 80 GB" and find_hardware(None, 24).gpus == 1
    for numbers, part in (((2, None), "say it: --gpu_memory 80"), ((-1, None), "`gpus` is -1"), ((1, 0), "positive")):
        with pytest.raises(SetupError, match=part):
            find_hardware(*numbers)
