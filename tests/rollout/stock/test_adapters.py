"""Adapters on their way to an engine of the base model."""

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from helpers import make_tiny_model
from mentor_trl.errors import SetupError
from mentor_trl.rollout.serving.adapters import check_adapter, write_adapter


def adapted(**options):
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(make_tiny_model(), LoraConfig(**config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, "alpha_pattern"),
        ({"r": 600}, "r=600"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_adapters_that_vllm_does_not_load(options, message):
    with pytest.raises(SetupError, match=message):
        check_adapter(adapted(**options))


def test_policies_without_a_lora():
    with pytest.raises(SetupError, match="the policy has none"):
        check_adapter(make_tiny_model())
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(SetupError, match="PROMPT_TUNING"):
        check_adapter(get_peft_model(make_tiny_model(), prompts))


def test_an_adapter_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    model = adapted()
    check_adapter(model)
    write_adapter(model, tmp_path / "v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "v1").iterdir()}
    assert all("lora" in name for name in load_file(tmp_path / "v1" / "adapter_model.safetensors"))

    def full(folder, **kwargs):
        (folder / "adapter_config.json").write_text("{")
        raise OSError("No space left")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(model, tmp_path / "v2")
    assert not (tmp_path / "v2").exists()
