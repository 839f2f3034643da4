import pytest
import torch

from mentor_trl.objective import fold_correction, shaping_weights


@pytest.mark.parametrize("constant", [0.01, 0.1, 1.0])
def test_weights_make_the_gradient_of_the_shaped_probability(constant):
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logps = (4.0 * logits).log_softmax(-1)[:, :3]
    advantages = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0], dtype=torch.float64)

    p = logps.exp()
    (expected,) = torch.autograd.grad((advantages[:, None] * p / (p + constant)).sum(), logits, retain_graph=True)
    weighed = fold_correction(advantages, shaping_weights(logps, constant))
    ratio = (logps - logps.detach()).exp()
    (gradient,) = torch.autograd.grad((weighed * ratio).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert expected.abs().max() > 1e-3


def test_extremes_stay_finite():
    weights = shaping_weights(torch.tensor([0.0, -1e4, float("-inf")]), 0.1)
    assert weights.tolist() == pytest.approx([0.1 / 1.1**2, 0.0, 0.0])
    assert shaping_weights(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("constant", [0.0, -0.1, float("nan")])
def test_a_constant_that_is_not_positive_is_refused(constant):
    with pytest.raises(ValueError, match="must be positive"):
        shaping_weights(torch.zeros(1), constant)
