"""What a model is, from its configuration and tokenizer: no weights are loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..errors import SetupError
from ..experts.compatibility import context_length
from ..experts.load import adapter_base


UNLOADABLE = (OSError, ValueError, KeyError, ImportError, HFValidationError)


@dataclass(frozen=True)
class ModelFacts:
    """
    A model without its weights.

    Attributes:
        name (`str`): Hub id or folder.
        model ([`~transformers.PreTrainedModel`]): The model on the meta device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        parameters (`int`): Number of weights.
        checkpoint_bytes (`float`): Bytes of a weight as it is stored.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    checkpoint_bytes: float

    @property
    def described(self) -> str:
        """Name and size."""
        unit, letter = next((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")) if self.parameters >= u)
        return f"{self.name}, {self.parameters / unit:.3g}{letter} parameters"

    @cached_property
    def config(self) -> Any:
        """The configuration of the text model."""
        return self.model.config.get_text_config()

    @property
    def context(self) -> int | None:
        """Context in tokens."""
        return context_length(self.config)

    @property
    def layers(self) -> int:
        return getattr(self.config, "num_hidden_layers", 1)

    @property
    def hidden(self) -> int:
        return self.config.hidden_size

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return getattr(self.config, "intermediate_size", None) or 4 * self.hidden

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def cached_numbers(self) -> int:
        """Numbers that the key-value cache holds for a token."""
        heads = getattr(self.config, "num_attention_heads", None) or 1
        shared = getattr(self.config, "num_key_value_heads", None) or heads
        size = getattr(self.config, "head_dim", None) or self.hidden // heads
        return 2 * self.layers * shared * size

    @cached_property
    def linear_widths(self) -> int:
        """Inputs and outputs of all linear layers but the LM head."""
        head = self.model.get_output_embeddings()
        linear = [one for one in self.model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
        return sum(one.in_features + one.out_features for one in linear)

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter of these layers."""
        return rank * self.linear_widths


def read_model(name: str, what: str, trust_remote_code: bool = False, revision: str | None = None) -> ModelFacts:
    """
    Read what a model is. `what` is what an error calls it; an adapter is its base model, into which it is merged.

    Raises:
        [`SetupError`]: if there is no such model, or no tokenizer beside it.
    """
    base = adapter_base(name, revision)
    source, options = base or name, {"trust_remote_code": trust_remote_code}
    if base is None:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except UNLOADABLE as error:
        absent = "" if Path(name).exists() else f"there is no folder {name}, and the Hub or its cache gives no model: "
        raise SetupError(f"The {what} {name!r} cannot be read: {absent}{_first_line(error)}") from error
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
    except UNLOADABLE:
        pass  # what the configuration says holds then
    return ModelFacts(
        name, model, _tokenizer(name, source, what, trust_remote_code), model.num_parameters(), _stored_bytes(config)
    )


def _tokenizer(name: str, source: str, what: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    for place in dict.fromkeys((name, source)):
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        except UNLOADABLE as error:
            reason = error
    raise SetupError(
        f"The {what} {name!r} has no tokenizer: {_first_line(reason)}; save it there: "
        "`tokenizer.save_pretrained(folder)`"
    ) from reason


def _stored_bytes(config: Any) -> float:
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        bits = quantized.get("bits", 4 if quantized.get("load_in_4bit", False) else 8)
        return bits / 8
    dtype = config.get_text_config().dtype
    return getattr(dtype, "itemsize", 4)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
