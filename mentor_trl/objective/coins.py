"""
Coins and seeds of rows that are sampled in several requests. Both are functions of the row and the position alone, so
that whoever knows a row can predict its coins, and an engine which samples a position twice gets the same one.
"""

import hashlib

import torch


ROLES = ("policy", "expert")
# Constants of SplitMix64 as signed integers, and of its two rounds of mixing
_STEP, _FACTORS = 0x9E3779B97F4A7C15 - 2**64, ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_BITS = 24  # what float32 holds in [0, 1)


def coin_uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Uniform numbers by which the coins z = uniform < w of rows fall: the output of SplitMix64 at a counter. The same on
    every device, in multiples of 2^-24.

    Args:
        seeds (`torch.Tensor` of shape `(...)`):
            Seeds of the rows, integers.
        positions (`torch.Tensor` broadcastable to `(...)`):
            Lengths of the prefixes before the tokens, prompts included.

    Returns:
        `torch.Tensor` of shape `(...)`, float32 in [0, 1).

    Example:
    ```python
    >>> coin_uniforms(torch.tensor([7, 7, 8]), torch.tensor([0, 1, 0]))
    tensor([0.5243, 0.3021, 0.9262])
    ```
    """
    bits = _mixed(_mixed(seeds.long()) + (positions.long() + 1) * _STEP)
    return _shifted(bits, 64 - _BITS).float() * 2.0**-_BITS


def request_seed(row_seed: int, position: int, role: str, attempt: int = 0) -> int:
    """
    Seed of the request by which a row goes on at a position, in [0, 2^63). Requests of one row must not share one:
    each engine would draw the same numbers again.

    Args:
        row_seed (`int`):
            Seed of the row.
        position (`int`):
            Length of the prefix that the request sends.
        role (`str`):
            Who draws, `"policy"` or `"expert"`.
        attempt (`int`, *optional*, defaults to `0`):
            How often the draw was made before and not kept.

    Raises:
        `ValueError`: if there is no such role.
    """
    if role not in ROLES:
        raise ValueError(f"Unknown role {role!r}; choose one of {', '.join(map(repr, ROLES))}.")
    text = f"{row_seed}/{position}/{role}/{attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    for shift, factor in _FACTORS:
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shift to the right that fills with zeros: torch's own repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
