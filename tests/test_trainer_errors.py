"""What is refused says what to change, before any training step."""

import pytest
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)
from trl import GRPOConfig

from helpers import SPECIAL_TOKENS, make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer
from mentor_trl.algorithms import Mentor
from mentor_trl.errors import SetupError
from trainer_helpers import SETTINGS, letters_reward, make_trainer, prompts


PLAIN = "`num_mixed_generations=0` for plain GRPO"
FSDP = rf"FSDP is not supported.*Set `use_vllm=True`, use DDP or DeepSpeed.*{PLAIN}"
ZERO3 = rf"`ds3_gather_for_generation=False`.*Set it to True, set `use_vllm=True`, or set {PLAIN}"


def given(model, tokenizer=None, **kwargs):
    return {"expert": model, "expert_processing_class": tokenizer or make_tiny_tokenizer(), **kwargs}


# Configuration


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"num_mixed_generations": 7}, r"leaves 1 of `num_generations=8`.*Set `num_mixed_generations` to 6 or less"),
        ({"num_mixed_generations": 9}, r"Set `num_mixed_generations` to 6 or less, or raise `num_generations` to 11"),
        ({"num_mixed_generations": -1}, "set it to 0"),
        ({"top_p": 0.9}, r"Set `top_p` to 1.0, or `num_mixed_generations` to 0"),
        ({"top_k": 20}, "Set `top_k` to 0"),
        ({"min_p": 0.1}, "Set `min_p` to None"),
        ({"repetition_penalty": 1.1}, "Set `repetition_penalty` to 1.0"),
        ({"generation_kwargs": {"num_beams": 2}}, "Remove it"),
        ({"temperature": 0.0}, "positive temperature"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "Use 'sum_then_normalize'"),
        ({"use_transformers_continuous_batching": True}, "Set it to False: they have their own engine"),
        ({"vllm_weight_sync": "disk"}, "choose one of 'auto', 'nccl', 'folder'"),
        ({"vllm_read_timeout": 0.0}, "a positive number of seconds"),
        ({"log_rollout_records": -1}, r"0 \(none\) or more"),
        ({"max_completion_length": None}, "need a limit, e.g. 512"),
        ({"branch_rule": "entropie"}, "choose one of 'entropy', 'threshold', 'random', 'sentence', 'always'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configuration(settings, fix):
    with pytest.raises(ValueError, match=fix):
        MentorGRPOConfig("unused", **{**SETTINGS, **settings})


def test_arguments_of_trl(tmp_path):
    with pytest.raises(TypeError, match=r"`args` is a GRPOConfig; MentorGRPOTrainer needs a MentorGRPOConfig"):
        MentorGRPOTrainer(make_tiny_model(), letters_reward, GRPOConfig(str(tmp_path), use_cpu=True), prompts())


# What mixed rollouts do not support


@pytest.mark.parametrize(
    "kwargs",
    [
        {"tools": [lambda x: x]},
        {"rollout_func": lambda prompts, trainer: {}},
        {"environment_factory": object},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_tools_and_environments(kwargs, tmp_path):
    with pytest.raises(ValueError, match=rf"`{next(iter(kwargs))}` is not supported.*Remove it, or set {PLAIN}"):
        make_trainer(tmp_path, trainer_kwargs=given(make_tiny_model(seed=1), **kwargs))


@pytest.mark.parametrize("how", ["accelerate", "transformers"])
def test_fsdp(how, tmp_path, monkeypatch):
    if how == "accelerate":  # what `accelerate launch --use_fsdp` sets
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match=FSDP):
            make_trainer(tmp_path)
    else:
        args = MentorGRPOConfig(str(tmp_path), **SETTINGS)
        args.fsdp = True
        with pytest.raises(ValueError, match=FSDP):
            MentorGRPOTrainer(make_tiny_model(), letters_reward, args, prompts(), expert=make_tiny_model(seed=1))


class Zero3:
    zero_stage = 3


def test_zero3_without_gathered_parameters(tmp_path):
    args = MentorGRPOConfig(str(tmp_path), ds3_gather_for_generation=False, **SETTINGS)
    args.deepspeed_plugin = Zero3()
    with pytest.raises(ValueError, match=ZERO3):
        MentorGRPOTrainer(make_tiny_model(), letters_reward, args, prompts(), expert=make_tiny_model(seed=1))


def test_sharded_models_are_no_matter_where_vllm_samples(tmp_path):
    args = MentorGRPOConfig(str(tmp_path), use_vllm=True, ds3_gather_for_generation=False, **SETTINGS)
    args.fsdp, args.deepspeed_plugin = True, Zero3()
    Mentor(args).check(prompts(), None)


@pytest.mark.parametrize("mixed", [0, 4])
@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_columns_whose_names_are_taken(column, mixed, tmp_path):
    dataset = prompts().add_column(column, ["1"] * 40)
    with pytest.raises(SetupError, match=rf"`train_dataset` has the column `{column}`, a name under which.*Rename it"):
        make_trainer(tmp_path, train_dataset=dataset, num_mixed_generations=mixed)


@pytest.mark.parametrize("column", ["image", "images"])
def test_vision_columns(column, tmp_path):
    dataset = prompts().add_column(column, [None] * 40)
    with pytest.raises(ValueError, match=rf"`train_dataset` has the column `{column}`.*Remove the column, or train"):
        make_trainer(tmp_path, train_dataset=dataset)
    with pytest.raises(ValueError, match=r"`eval_dataset\['a'\]` has the column"):
        make_trainer(tmp_path, trainer_kwargs=given(make_tiny_model(seed=1), eval_dataset={"a": dataset}))


def test_policies_that_decode_otherwise_than_they_read(tmp_path):
    """A state-space policy samples in lockstep; RWKV ignores the padding of shorter rows."""
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=1)
    config.pad_token_id, config.eos_token_id = 0, 2
    make_trainer(tmp_path, model=MambaForCausalLM(config), max_steps=1).train()
    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, eos_token_id=2, bos_token_id=1)
    with pytest.raises(ValueError, match=r"The policy \(RwkvForCausalLM\).*differ by .* nats"):
        make_trainer(tmp_path, model=RwkvForCausalLM(config))


# Data


@pytest.mark.parametrize("mixed", [0, 4])
def test_datasets(mixed, tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` is empty. Check the split and the filters"):
        make_trainer(tmp_path, train_dataset=prompts(0), num_mixed_generations=mixed)
    dataset = Dataset.from_dict({"question": ["1+1="], "solution": ["2"]})
    with pytest.raises(ValueError, match=r"no column `prompt`; it has question, solution. Rename the column"):
        make_trainer(tmp_path, train_dataset=dataset, num_mixed_generations=mixed)


def test_an_environment_may_bring_the_prompts(tmp_path):
    """Plain GRPO leaves environments to TRL, whose datasets need no prompts then. What stops here is TRL's check."""

    class Environment:
        def reset(self, **kwargs):
            return "1+1="

    with pytest.raises(ValueError, match="chat template does not support tool calling"):
        make_trainer(
            tmp_path,
            num_mixed_generations=0,
            train_dataset=Dataset.from_dict({"environment": ["a"]}),
            trainer_kwargs={"environment_factory": {"a": Environment}},
        )


# The expert


def test_no_expert_or_two(tmp_path, tiny_expert_dir):
    with pytest.raises(ValueError, match=rf"No expert: set `expert_model_name_or_path`, pass `expert=`.*{PLAIN}"):
        make_trainer(tmp_path, trainer_kwargs={"expert": None})
    with pytest.raises(ValueError, match=r"given twice, as `expert=` and as `expert_model_name_or_path=.*Keep one"):
        make_trainer(
            tmp_path,
            expert_model_name_or_path=str(tiny_expert_dir),
            trainer_kwargs=given(make_tiny_model(seed=1)),
        )


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/no-such-model", "not a name"])
def test_expert_that_is_not_there(name, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)No expert could be loaded from `expert_model_name.*Give a model id"):
        make_trainer(tmp_path, expert_model_name_or_path=name)


def test_expert_without_tokenizer(tmp_path):
    make_tiny_model(seed=1).save_pretrained(tmp_path / "expert")
    for kwargs, settings in (
        ({"expert": make_tiny_model(seed=1)}, {}),
        ({}, {"expert_model_name_or_path": str(tmp_path / "expert")}),
    ):
        with pytest.raises(
            ValueError, match=r"(?s)tokenizer is needed.*Pass it as `expert_processing_class`, or save"
        ):
            make_trainer(tmp_path / "a", trainer_kwargs=kwargs, **settings)


def test_another_vocabulary(tmp_path):
    vocabulary = [*SPECIAL_TOKENS, *reversed("0123456789")]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    with pytest.raises(
        ValueError,
        match=r"different vocabularies: 57 of 64 ids differ.*id 7: '0' / '9'.*choose an expert of the policy's",
    ):
        make_trainer(tmp_path, trainer_kwargs=given(make_tiny_model(seed=1), other))


@pytest.mark.parametrize("who", ["policy", "expert"])
def test_embeddings_with_too_few_rows(who, tmp_path):
    small, enough = make_tiny_model(vocab_size=60), make_tiny_model()
    policy, expert = (small, enough) if who == "policy" else (enough, small)
    with pytest.raises(ValueError, match=rf"The {who}'s output embedding has 60 rows.*resize_token_embeddings\(64\)"):
        make_trainer(tmp_path, model=policy, trainer_kwargs=given(expert))


def test_stop_tokens(tmp_path):
    expert = make_tiny_model(seed=1)
    expert.generation_config.eos_token_id = [2, 6]
    with pytest.raises(ValueError, match=r"6 \('<bot>'\); the policy stops at \[2\]. Set `extend_stop_tokens=True`"):
        make_trainer(tmp_path, trainer_kwargs=given(expert))
    trainer = make_trainer(tmp_path, extend_stop_tokens=True, trainer_kwargs=given(expert))
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [2, 6]
    assert trainer.generation_kwargs["eos_token_id"] == [2, 6]


@pytest.mark.parametrize("who", ["policy", "expert"])
def test_context(who, tmp_path):
    short, long = make_tiny_model(), make_tiny_model(seed=1)
    short.config.max_position_embeddings = 32
    policy, expert = (short, long) if who == "policy" else (long, short)
    trainer = make_trainer(tmp_path, model=policy, max_completion_length=26, trainer_kwargs=given(expert))
    assert trainer.engine.sampler is not None  # the longest prompt has 6 tokens
    with pytest.raises(
        ValueError, match=rf"A prompt of 6 tokens.*exceed the {who}'s context of 32.*lower .* to 26 or"
    ):
        make_trainer(tmp_path, model=policy, max_completion_length=27, trainer_kwargs=given(expert))


def test_context_of_a_stream(tmp_path):
    """The prompts of a stream are not known at construction: the first rollout that does not fit says so."""
    expert = make_tiny_model(seed=1)
    expert.config.max_position_embeddings = 32
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n' * 40)
    files = str(tmp_path / "data.jsonl")
    stream = load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    trainer = make_trainer(tmp_path, train_dataset=stream, max_completion_length=30, trainer_kwargs=given(expert))
    with pytest.raises(
        ValueError, match=r"exceed the expert's context of 32 tokens. To fit, lower `max_completion_length`"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("who", ["policy", "expert"])
def test_weights_that_are_not_numbers(who, tmp_path):
    policy, expert = make_tiny_model(), make_tiny_model(seed=1)
    trainer = make_trainer(tmp_path, model=policy, trainer_kwargs=given(expert))
    {"policy": policy, "expert": expert}[who].lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"The {who}'s logits are NaN.*check the {who}'s checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 0
    broken = make_tiny_model(seed=1)
    broken.lm_head.weight.data.fill_(torch.nan)
    models = {"policy": (broken, expert), "expert": (make_tiny_model(), broken)}[who]
    with pytest.raises(ValueError, match=rf"The {who}'s logits are NaN"):
        make_trainer(tmp_path, model=models[0], trainer_kwargs=given(models[1]))


def test_errors_come_before_the_expert_is_loaded(tmp_path, monkeypatch):
    """What can be seen without the models is said before they are loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="is empty"):
        make_trainer(tmp_path, train_dataset=prompts(0), expert_model_name_or_path="nobody/no-such-model")
