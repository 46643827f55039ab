"""Masked negative log-likelihood as a sum and a count, so that any split over ranks adds up to the same loss.

Shapes: B batch, L samples, V levels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nll(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the scored samples.

    logits: (..., V), any floating type; targets: (...) int64; mask: (...) bool, True where a sample is scored.
    Returns (nats, count): the summed nats, a float64 scalar that carries the gradient, and the number of scored
    samples, an int64 scalar. Every sample's nats are computed in float32 (float64 for float64 logits). With nothing
    scored the sum is 0 and so is every gradient. A masked sample never reaches the sum, even where its logits are NaN.
    """
    # The wider type is asked of the softmax itself, which spares a wider copy of the logits where torch can.
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    scored = targets.masked_fill(~mask, -100)
    per_sample = F.nll_loss(log_p.flatten(0, -2), scored.flatten(), ignore_index=-100, reduction="none")
    # 128,000 float32 terms lose digits in a float32 sum, differently for every way of splitting the batch.
    return per_sample.sum(dtype=torch.float64), mask.sum()


def bits_per_sample(nats: float, count: int) -> float:
    """Mean bits per scored sample from summed nats; NaN if nothing was scored."""
    return nats / (count * math.log(2)) if count else math.nan
