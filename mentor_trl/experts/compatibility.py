"""Whether an expert can speak inside the policy's rollouts: tokens, stop ids, context."""

from collections.abc import Sequence

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SetupError


def text_model(model) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def vocabulary_size(model) -> int:
    """Rows of a model's output embedding, also where ZeRO-3 has its weights in shards."""
    weight = text_model(model).get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, expert_tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Check that the tokenizers of policy and expert define the same tokens.

    Raises:
        `SetupError`: naming the first tokens that differ.
    """
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in expert_tokenizer.get_vocab().items()}
    different = sorted(index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index))
    if different:
        shown = "; ".join(f"id {i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in different[:5])
        raise SetupError(
            f"Policy and expert have different vocabularies: {len(different)} of {len(ours.keys() | theirs.keys())} "
            f"ids differ (policy / expert): {shown}. Mixed rollouts need the same tokens: choose an expert of the "
            "policy's family, or train one from the policy."
        )
    return max(ours) + 1


def check_vocabulary(policy, expert, tokenizer: PreTrainedTokenizerBase, expert_tokenizer: PreTrainedTokenizerBase):
    """
    Check that policy and expert share one vocabulary, token by token. Embeddings may be padded differently.

    Raises:
        `SetupError`: naming the first tokens that differ, or the model with too few rows.
    """
    needed = check_tokenizers(tokenizer, expert_tokenizer)
    for name, model in (("policy", policy), ("expert", expert)):
        weight = text_model(model).get_output_embeddings().weight
        rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor in place of its shards
        if rows < needed:
            raise SetupError(
                f"The {name}'s output embedding has {rows} rows, and the tokenizer defines {needed} ids. Call "
                f"`resize_token_embeddings({needed})` on the {name} and save it."
            )


def stop_token_ids(model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id with which a model ends a completion: of its generation config, its config and its tokenizer."""
    base = text_model(model)
    ids: list[int] = []
    for value in (
        base.generation_config.eos_token_id if base.generation_config is not None else None,
        base.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        values = value if isinstance(value, (list, tuple)) else [value]
        ids += [index for index in values if index is not None and index not in ids]
    return ids


def check_stop_tokens(
    stop: list[int], expert, expert_tokenizer: PreTrainedTokenizerBase, extend: bool = False
) -> list[int]:
    """
    The one stop set of policy and mixed rollouts.

    Raises:
        `SetupError`: if the expert has other stop ids and `extend` is `False`.
    """
    return check_stop_ids(stop, stop_token_ids(expert, expert_tokenizer), expert_tokenizer, extend)


def check_stop_ids(
    stop: list[int], expert_stop: list[int], tokenizer: PreTrainedTokenizerBase, extend: bool = False
) -> list[int]:
    """[`check_stop_tokens`] for an expert that is known by its stop ids alone."""
    own = [index for index in expert_stop if index not in stop]
    if own and not extend:
        names = ", ".join(f"{index} ({tokenizer.convert_ids_to_tokens(index)!r})" for index in own)
        raise SetupError(
            f"The expert ends its completions with ids that do not end the policy's: {names}; the policy stops at "
            f"{stop}. Set `extend_stop_tokens=True` to stop both at either, or correct the `eos_token_id` of the "
            "expert's generation config."
        )
    return [*stop, *own]


def context_length(config) -> int | None:
    """
    Tokens that a model reads with one set of frequencies, from its (text) config; `None` where it names no limit.

    A `longrope` model switches to other frequencies beyond its original context, for all tokens at once, which keys
    that are cached already cannot follow.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", None)
    return getattr(config, "max_position_embeddings", None)


def check_context(
    prompts: Sequence[int], max_completion_length: int, limit: int | None, whose: str, remedy: str = ""
) -> None:
    """
    Check that no rollout can outgrow a context.

    Raises:
        `SetupError`: naming the row, the lengths and what to change.
    """
    if limit is None or not len(prompts):
        return
    row, longest = max(enumerate(prompts), key=lambda item: item[1])
    if longest + max_completion_length <= limit:
        return
    room = limit - longest
    keep = limit - max_completion_length
    ways = [f"lower `max_completion_length` to {room} or less"] if room > 0 else []
    ways += [f"drop prompts of more than {keep} tokens"] if keep > 0 else []
    *first, last = (ways or ["shorten both"]) + ([remedy] if remedy else [])
    where = f" (row {row})" if len(prompts) > 1 else ""
    raise SetupError(
        f"A prompt of {longest} tokens{where} and `max_completion_length={max_completion_length}` exceed {whose} "
        f"context of {limit} tokens. To fit, {', '.join([*first, 'or ' * bool(first) + last])}."
    )
