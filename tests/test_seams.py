"""
What we override and rely on in TRL and transformers, pinned: an upgrade that changes it fails here, early and by name.
"""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler, nanstd, shuffle_sequence_dict, split_tensor_dict

from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer
from mentor_trl.publishing.card import HEADING
from trainer_helpers import make_trainer


INIT = "self model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks "
INIT += "optimizers quantization_config peft_config tools rollout_func environment_factory"
LOGPS = "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
LOGPS += "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
LOGPS += "mm_token_type_ids image_position_ids"

# Newer releases of transformers have one option more
PRIVATE = "private " if "private" in inspect.signature(Trainer.push_to_hub).parameters else ""
OVERRIDDEN = {
    "__init__": INIT,
    "_generate_and_score_completions": "self inputs",
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_get_per_token_logps_and_entropies": LOGPS,
    "_compute_loss": "self model inputs",
    "log": "self logs start_time",
    "create_model_card": "self model_name dataset_name tags",
    "push_to_hub": f"self commit_message blocking token revision {PRIVATE}kwargs",
    "_push_from_checkpoint": "self checkpoint_folder",
    "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "_save_optimizer_and_scheduler": "self output_dir",
    "_load_optimizer_and_scheduler": "self checkpoint",
}
CALLED = {
    GRPOTrainer._tokenize_prompts: "self prompts",
    GRPOTrainer._log_completion_extra: "self column values",
    GRPOTrainer._prepare_inputs: "self generation_batch",
    GRPOTrainer.training_step: "self model inputs num_items_in_batch",
    GRPOTrainer.compute_loss: "self model inputs return_outputs num_items_in_batch",
    unwrap_model_for_generation: "model accelerator gather_deepspeed3_params generation_kwargs "
    "gradient_checkpointing_kwargs",
    RepeatSampler.__init__: "self data_source mini_repeat_count batch_size repeat_count shuffle seed",
    nanstd: "tensor dim keepdim",
    shuffle_sequence_dict: "seq_dict",
    split_tensor_dict: "tensor_dict num_chunks",
    is_conversational: "example",
    Trainer._save_optimizer_and_scheduler: "self output_dir",
    Trainer._load_optimizer_and_scheduler: "self checkpoint",
    Trainer._save_checkpoint: "self model trial",
}


VLLM_INIT = "self model accelerator processing_class mode structured_outputs_regex server_base_url server_host "
VLLM_INIT += "server_port server_timeout group_port tensor_parallel_size gpu_memory_utilization max_model_length "
VLLM_INIT += "max_num_seqs enable_sleep_mode model_impl trust_remote_code repetition_penalty temperature top_p top_k "
VLLM_INIT += "min_p max_completion_length logprobs generation_kwargs"
CALLED |= {
    VLLMGeneration.__init__: VLLM_INIT,
    VLLMGeneration._init_vllm: "self",
    VLLMGeneration._iter_named_params: "self",
    VLLMGeneration.sync_weights: "self",
    VLLMGeneration.generate: "self prompts images num_generations profiler",
    VLLMClient.__init__: "self base_url host server_port group_port connection_timeout",
    VLLMClient._post: "self url kwargs",
    VLLMClient._start_weight_update: "self",
    VLLMClient.init_communicator: "self device",
    VLLMClient.update_named_params: "self metadata named_params",
    VLLMClient.close_communicator: "self",
}


def names(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_methods_that_are_overridden(name):
    assert names(getattr(GRPOTrainer, name)) == OVERRIDDEN[name].split()


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__qualname__)
def test_functions_that_are_relied_on(function):
    assert names(function) == CALLED[function].split()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overrides_take_what_trl_takes(name):
    theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters.values()
    ours = inspect.signature(getattr(MentorGRPOTrainer, name))
    required = [p for p in theirs if p.default is p.empty]
    by_name = {p.name: p.default for p in theirs if p not in required}
    ours.bind(*required, *by_name.values())
    ours.bind(*required, **by_name)
    for parameter in theirs:
        mine = ours.parameters.get(parameter.name)
        if mine is not None and mine.default is not mine.empty:
            assert mine.default == parameter.default, parameter.name


@pytest.mark.parametrize("method", [Trainer.push_to_hub, Trainer._push_from_checkpoint], ids=lambda m: m.__name__)
def test_the_trainer_uploads_through_the_method_that_is_watched(method):
    source = inspect.getsource(method)
    assert "hf_api().upload_folder(" in source and source.count("upload_") == source.count(".upload_folder(")
    assert transformers.trainer.hf_api().upload_folder.__func__ is HfApi.upload_folder
    keyword_only = inspect.signature(HfApi.upload_folder).parameters
    assert {keyword_only[name].kind.name for name in ("folder_path", "ignore_patterns")} == {"KEYWORD_ONLY"}


def test_the_model_card_has_the_places_that_are_completed():
    template = Path(inspect.getfile(GRPOTrainer)).parents[1] / "templates" / "lm_model_card.md"
    text = template.read_text(encoding="utf-8")
    assert text.count(HEADING) == 1 and text.count("\n## Citations\n") == 1
    assert "[{{ base_model }}](https://huggingface.co/{{ base_model }})" in text
    # What `push_to_hub` does not know itself goes to `create_model_card`
    assert "self.create_model_card(model_name=model_name, **kwargs)" in inspect.getsource(Trainer.push_to_hub)


def test_every_override_is_pinned():
    """A method of ours that hides one of TRL's or of the Trainer's is in the table above."""
    hidden = {name for name, value in vars(MentorGRPOTrainer).items() if inspect.isroutine(value)}
    hidden &= {name for cls in GRPOTrainer.__mro__[:-1] for name in vars(cls)}
    assert hidden == set(OVERRIDDEN)


def test_new_names_hide_nothing():
    """Attributes and methods that are ours alone do not exist in TRL, now or after an upgrade."""
    ours = {name for name in vars(MentorGRPOTrainer) if not name.startswith("__")} - set(OVERRIDDEN)
    assert ours & set(dir(GRPOTrainer)) == set()
    assert len(OVERRIDDEN) <= 13  # `__init__` and twelve hooks


def test_attributes_that_are_read_and_set(tmp_path):
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, config=GRPOConfig, log_completions=True)
    assert set(trainer._logs) == {"images", "prompt", "completion", "rewards", "advantages", "extra"}
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer._step == 0 and trainer._buffered_inputs is None
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [2]
    assert trainer.generation_kwargs["eos_token_id"] == [2]
    assert trainer._tokenizer is trainer.processing_class and trainer._is_vlm is False
    assert trainer._dist.is_zero3 is False
    assert trainer.reward_func_names == ["letters_reward"] and trainer.reward_weights.tolist() == [1.0]
    assert trainer.scale_rewards == "group" and trainer.beta == 0.0 and trainer.temperature == 1.0
    assert trainer.num_generations == 8 and trainer.num_iterations == 1 and trainer.max_completion_length == 8
    assert trainer.chat_template is None and trainer.chat_template_kwargs == {}
    assert trainer.log_completions is True and trainer.state.global_step == 0
    for name in (
        "algorithm",
        "engine",
        "batch",
        "processes",
        "logs_by_mode",
        "run_callback",
    ):
        assert not hasattr(trainer, name), f"TRL has an attribute {name} of its own"


def test_the_sampler_draws_one_permutation_an_epoch():
    """Resuming past the first epoch repeats these draws."""
    sampler = RepeatSampler(range(6), mini_repeat_count=2, batch_size=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        expected = torch.randperm(6, generator=generator).tolist()
        assert list(sampler)[::2] == expected
    assert sampler.num_samples == 6 and sampler.shuffle is True


def test_only_the_loss_asks_for_entropies():
    """What a forward pass inside `_compute_loss` returns has entropies."""
    asking = [
        name
        for name, method in vars(GRPOTrainer).items()
        if inspect.isfunction(method) and "compute_entropy=True" in inspect.getsource(method)
    ]
    assert asking == ["_compute_loss"]


def test_a_rollout_batch_is_shuffled_and_split_as_a_whole():
    batch = {
        "ids": torch.arange(8),
        "advantages": torch.arange(8).repeat(3, 1).T,
        "mentor_source": torch.arange(8) % 3,
    }
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 2):
        assert torch.equal(part["advantages"][:, 0], part["ids"])
        assert torch.equal(part["mentor_source"], part["ids"] % 3)


def test_the_loss_takes_per_token_advantages():
    assert "advantages.dim() == 1" in inspect.getsource(GRPOTrainer._compute_loss)


def test_the_loss_reads_advantages_and_ratios_after_its_forward_pass():
    """The shaping of trajectories depends on the log-probabilities of that pass, and is put in between."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    forward = source.index("self._get_per_token_logps_and_entropies(")
    assert forward < source.index('inputs["advantages"]') and forward < source.index('"old_per_token_logps"')


def test_version_of_trl():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (requirement,) = [Requirement(line) for line in re.findall(r'"(trl[^"]*)",', text) if line.startswith("trl>")]
    assert requirement.specifier.contains(version("trl"))
    assert not requirement.specifier.contains("1.15.0") and not requirement.specifier.contains("1.17.0")


def test_configuration_adds_to_trls():
    added = set(MentorGRPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    own = set(MentorGRPOConfig.__annotations__)
    assert added == own, "a field of ours hides one of TRL's"


def test_trainer_module_names():
    assert grpo_trainer.GRPOTrainer is GRPOTrainer and GRPOTrainer._name == "GRPO"
    assert GRPOTrainer._tag_names == ["trl", "grpo"] and set(GRPOTrainer._paper) == {"title", "id", "citation"}


def test_trls_vllm_backend_is_built_by_a_name_of_its_module():
    """`mixed_generation` puts ours there while the trainer is built."""
    source = inspect.getsource(GRPOTrainer.__init__)
    assert source.count("VLLMGeneration(") == 1 and "self.vllm_generation = VLLMGeneration(" in source
    assert grpo_trainer.VLLMGeneration is VLLMGeneration
    assert 'vllm_client.get_server_info()["model_config"]["logprobs_mode"]' in source


def test_what_trl_does_with_its_vllm_backend():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "if self.state.global_step != self._last_loaded_step:" in source
    assert "_, completion_ids, logprobs, _ = self.vllm_generation.generate(" in source
    generate = inspect.getsource(VLLMGeneration.generate)  # stop tokens are added to it
    assert "update(self.generation_kwargs)" in generate and '"generation_kwargs": self.generation_kwargs' in generate
    used = {
        name
        for method in vars(GRPOTrainer).values()
        if inspect.isfunction(method)
        for name in re.findall(r"self\.vllm_generation\.(\w+)", inspect.getsource(method))
    }
    assert used == {"generate", "sync_weights", "vllm_client", "llm"}  # `llm` with tools only


def test_trls_weight_transfer_starts_by_the_method_that_is_overridden():
    assert "self._start_weight_update()" in inspect.getsource(VLLMClient.update_named_params)


def test_trl_leaves_tokens_without_a_log_probability_alone():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "torch.nan_to_num(per_token_logps_diff, nan=0.0)" in source
