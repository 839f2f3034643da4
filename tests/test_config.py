"""MentorGRPOConfig: defaults, checks, and one source of truth for its documentation."""

import dataclasses
import re

import pytest
import torch
from transformers import HfArgumentParser
from trl import GRPOConfig

from mentor_trl import MentorGRPOConfig
from mentor_trl.config import BRANCH_RULES, CORRECTION_LEVELS, CORRECTIONS, MIXED_SCALES, SCHEDULES
from trainer_helpers import SETTINGS


FIELDS = {f.name: f for f in dataclasses.fields(MentorGRPOConfig) if f.name in MentorGRPOConfig.__annotations__}


def make(**settings) -> MentorGRPOConfig:
    return MentorGRPOConfig("unused", **{**SETTINGS, **settings})


def test_defaults_are_the_papers_group_and_schedule():
    config = make()
    assert (config.num_generations, config.num_mixed_generations) == (8, 4)
    assert (config.entropy_quantile, config.entropy_threshold_min, config.entropy_threshold) == (0.95, 0.1, None)
    assert (config.alpha, config.alpha_schedule, config.expert_decay_steps) == (1.0, "cosine", 120)
    assert (config.correction, config.correction_exponent, config.correction_cap) == ("temper", 0.25, 1.0)
    assert config.branch_rule == "entropy" and config.correction_level == "conditional"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_quantile": 1.1}, "`entropy_quantile` is 1.1; it must be between 0 and 1"),
        ({"entropy_quantile": -0.1}, "between 0 and 1"),
        ({"entropy_threshold_min": 0.0}, "a positive number of nats, e.g. 0.1"),
        ({"entropy_threshold": 0.0}, "or unset to use `entropy_quantile`"),
        ({"draft_length": 0}, "`draft_length` is 0; it must be at least 1"),
        ({"rollout_batch_size": 0}, "at least 1"),
        ({"alpha": -1.0}, "`alpha` is -1.0; it must be 0 or more"),
        ({"expert_decay_steps": 0}, "for no guidance set `alpha` to 0"),
        ({"guidance_margin": 0.0}, "positive, e.g. 0.1"),
        ({"guidance_gap_exponent": -1.0}, "0 or more"),
        ({"guidance_patience": 0}, "at least 1"),
        ({"guidance_smoothing": 1.0}, "at least 0 and below 1"),
        ({"guidance_probe_every": -1}, "0 (never) or more"),
        ({"reward_range": 0.0}, "`reward_range` is 0.0; it must be positive"),
        ({"correction_cap": 0.0}, "`inf` for no cap"),
        ({"correction_floor": 2.0}, "between 0 and correction_cap"),
        ({"correction_exponent": -1.0}, "0 or more"),
        ({"correction_constant": 0.0}, "positive"),
        ({"expert_load_in_4bit": True, "expert_load_in_8bit": True}, "False where `expert_load_in_8bit` is True"),
        ({"branch_rule": "x"}, "choose one of 'entropy', 'threshold', 'random', 'sentence', 'always'"),
        ({"alpha_schedule": "x"}, "choose one of 'cosine', 'linear', 'constant', 'adaptive'"),
        ({"correction": "x"}, "choose one of 'temper', 'clip', 'mask', 'saturate'"),
        ({"correction_level": "x"}, "choose one of 'conditional', 'mixture'"),
        ({"mixed_advantage_scale": "x"}, "choose one of 'range', 'std', 'group_std'"),
        ({"expert_dtype": "half"}, "choose one of 'auto', 'bfloat16', 'float16', 'float32'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**settings)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("branch_rule", BRANCH_RULES),
        ("alpha_schedule", SCHEDULES),
        ("correction", CORRECTIONS),
        ("correction_level", CORRECTION_LEVELS),
        ("mixed_advantage_scale", MIXED_SCALES),
    ],
)
def test_choices(name, choices):
    assert FIELDS[name].metadata["choices"] == list(choices)
    for choice in choices:
        assert getattr(make(**{name: choice}), name) == choice


def test_plain_grpo_may_sample_as_trl_does():
    config = make(num_mixed_generations=0, top_p=0.9, top_k=20, min_p=0.1, generation_kwargs={"num_beams": 1})
    assert config.top_p == 0.9


def test_the_largest_number_of_mixed_rollouts():
    assert make(num_mixed_generations=6).num_mixed_generations == 6
    with pytest.raises(ValueError, match="the baseline needs at least 2"):
        make(num_mixed_generations=7)
    assert make(num_mixed_generations=8).num_mixed_generations == 8
    with pytest.raises(ValueError, match="`num_mixed_generations=9` is more than `num_generations=8`"):
        make(num_mixed_generations=9)
    with pytest.raises(ValueError, match="`num_mixed_generations=8` of 8 leaves none. Set it to 'previous'"):
        make(num_mixed_generations=8, entropy_threshold_from="current")


def test_no_cap():
    assert make(correction_cap=float("inf")).correction_cap == float("inf")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented(name):
    field, text = FIELDS[name], MentorGRPOConfig.__doc__
    assert field.metadata["help"].endswith(".")
    default = "" if field.default is None else f", defaults to `{field.default!r}`"
    start = text.index(f"\n    {name} (`") + 1
    head, _, rest = text[start:].partition(":\n")
    assert head.endswith(f"`, *optional*{default})")
    assert " ".join(rest.split()).startswith(field.metadata["help"])


def test_command_line():
    (config,) = HfArgumentParser(MentorGRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "unused", "--use_cpu", "True", "--bf16", "False", "--num_mixed_generations", "2"]
        + ["--expert_model_init_kwargs", '{"attn_implementation": "eager"}', "--correction", "clip", "--top_k", "0"]
    )
    assert config.num_mixed_generations == 2 and config.correction == "clip"
    assert config.expert_model_init_kwargs == {"attn_implementation": "eager"}


def test_it_survives_being_saved():
    config = make(expert_model_name_or_path="open-r1/OpenR1-Qwen-7B", expert_model_init_kwargs={"a": 1})
    saved = config.to_dict()
    assert saved["expert_model_name_or_path"] == "open-r1/OpenR1-Qwen-7B"
    assert isinstance(config, GRPOConfig) and '"num_mixed_generations": 4' in config.to_json_string()


def test_the_device_of_a_process_on_the_cpu_is_known_to_torch(tmp_path, monkeypatch):
    config = MentorGRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    monkeypatch.setattr("trl.GRPOConfig.device", torch.device("cpu:1"))
    assert config.device == torch.device("cpu")
