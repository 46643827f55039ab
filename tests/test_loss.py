"""Loss: equal to the definition, additive over any split, deaf to masked samples."""

import math

import pytest
import torch
from torch import Tensor

from sashimi.loss import bits_per_sample, nll

B, L, V = 3, 50, 17


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, L, V), targets and mask (B, L); the last row is fully masked."""
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(B, L, V, generator=draw)).to(dtype)
    mask = torch.rand(B, L, generator=draw) < 0.7
    mask[-1] = False
    return logits, torch.randint(V, (B, L), generator=draw), mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sum_of_nats_is_the_definition_in_float32(dtype: torch.dtype) -> None:
    """Law 13. Whatever the logits' type, -log softmax is computed in float32 or better.

    Mutation: drop `dtype=...` from the log_softmax; half-precision log-probabilities are off by 1e-3.
    """
    logits, targets, mask = batch(dtype)
    exact = -torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None])[..., 0][mask].sum()
    nats, count = nll(logits, targets, mask)
    assert nats.dtype == torch.float64
    assert count.dtype == torch.int64
    assert count == mask.sum()
    torch.testing.assert_close(nats, exact, rtol=1e-6, atol=0)


def test_autocast_does_not_narrow_the_loss() -> None:
    """Law 5. Under autocast too, half-precision logits are widened before the softmax.

    Mutation: drop `dtype=...` from the log_softmax.
    """
    logits, targets, mask = batch(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        nats, _ = nll(logits, targets, mask)
    torch.testing.assert_close(nats, nll(logits.double(), targets, mask)[0], rtol=1e-6, atol=0)


def test_parts_add_up_to_the_whole() -> None:
    """Law 13. Sums and counts of any split of a batch add up, so ranks and micro-batches do not matter.

    Mutation: reduction="mean", or sum in float32 (128,000 samples then differ by more than 1e-9).
    """
    draw = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(8, 16000, 4, generator=draw), torch.randint(4, (8, 16000), generator=draw)
    mask = torch.rand(8, 16000, generator=draw) < torch.linspace(0, 1, 8)[:, None]
    whole, count = nll(logits, targets, mask)
    parts = [nll(logits[i : i + n], targets[i : i + n], mask[i : i + n]) for i, n in ((0, 1), (1, 5), (6, 2))]
    assert sum(int(part[1]) for part in parts) == count
    torch.testing.assert_close(sum(part[0] for part in parts), whole, rtol=1e-12, atol=0)


def test_masked_samples_are_not_heard() -> None:
    """Laws 8 and 13. NaN logits and any target at a masked place change nothing; no gradient reaches it.

    Mutation: multiply by the mask instead of ignoring (0 · NaN is NaN).
    """
    logits, targets, mask = batch()
    expected, _ = nll(logits, targets, mask)
    spoilt = logits.masked_fill(~mask[..., None], math.nan)
    assert nll(spoilt, targets.masked_fill(~mask, 0), mask)[0] == expected
    logits.requires_grad_()
    nll(logits, targets, mask)[0].backward()
    assert logits.grad is not None
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any(-1).all()


def test_all_masked_batch_is_zero_with_zero_gradients() -> None:
    """Law 13. Nothing scored: sum 0, count 0, every gradient exactly 0.

    Mutation: reduction="mean" (0 / 0).
    """
    logits, targets, mask = batch()
    logits.requires_grad_()
    nats, count = nll(logits, targets, torch.zeros_like(mask))
    nats.backward()
    assert nats == 0
    assert count == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_bits_per_sample() -> None:
    """A uniform model of 2**b levels costs b bits. Mutation: divide by log(10)."""
    nats, count = nll(torch.zeros(2, 5, 256), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool))
    assert bits_per_sample(float(nats), int(count)) == pytest.approx(8, rel=1e-6)
    assert math.isnan(bits_per_sample(0.0, 0))
