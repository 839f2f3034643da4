"""Attention of grouped heads under a mask per row, without repeating keys and values."""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


NAME = "mentor_ragged"


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot-product attention in which the query heads of a key-value head are queries of it.

    transformers' own `"sdpa"` copies keys and values once per query head when there is a mask, which is most of the
    cost of a decoding step.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs)
    batch, heads, queries, _ = query.shape
    shared = heads // key.size(1)
    grouped = query.reshape(batch, key.size(1), shared * queries, -1)
    mask = attention_mask.repeat(1, 1, shared, 1) if shared > 1 and queries > 1 else attention_mask
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, ragged_attention)
