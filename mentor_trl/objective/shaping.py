"""Policy shaping of expert trajectories, from [LUFFY](https://huggingface.co/papers/2504.14945)."""

import math

import torch


def shaping_weights(logps: torch.Tensor, constant: float = 0.1) -> torch.Tensor:
    r"""
    What the gradient of a trajectory's token is weighed by.

    LUFFY maximizes A f(p) with f(x) = x / (x + c) at a token of an expert trajectory, whose behaviour probability it
    takes to be 1, and differentiates through f. As f(p) = sigmoid(log p - log c), the gradient is w A grad log p with

        w = c p / (p + c)^2 = sigmoid(a) sigmoid(-a),  a = log p - log c.

    w is at most 1/4, at p = c. Detached and folded into the advantage of a token whose ratio is 1, it gives exactly
    that gradient.

    Args:
        logps (`torch.Tensor` of any shape):
            log p of the tokens under the policy that is trained, in nats.
        constant (`float`, *optional*, defaults to `0.1`):
            c, positive.

    Returns:
        `torch.Tensor` of the same shape, in float32 or wider.

    Example:
    ```python
    >>> shaping_weights(torch.tensor([1.0, 0.1, 0.001]).log(), constant=0.1)
    tensor([0.0826, 0.2500, 0.0098])
    ```
    """
    if not constant > 0.0:
        raise ValueError(f"The constant of the policy shaping is {constant}; it must be positive.")
    logits = logps.detach()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) - math.log(constant)
    return torch.sigmoid(logits) * torch.sigmoid(-logits)
