"""Linear layers over sequences, on CPUs by the one of torch's two libraries that suits their maker."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sashimi.native.pointwise import serves

_IMAGES = 16  # with fewer of them, on one thread, torch does not give such a convolution to oneDNN
_FEWEST = 1 << 10  # rows: for fewer it does not pay


class Linear(nn.Linear):
    """nn.Linear. On AMD's CPUs, in float32, what is long is a convolution of width 1, which torch gives to oneDNN.

    Products, as nn.Linear has them, go to MKL, which is made for Intel's CPUs: on AMD's it is slower by a quarter.
    """

    def forward(self, x: Tensor, then: Callable[[Tensor, Tensor | None], Tensor] | None = None) -> Tensor:
        """x: (..., in_features) -> (..., out_features), or what `then` makes of that: `pointwise.gelu` or `glu`."""
        if then is None:
            return self._affine(x, self.bias)
        if serves(x):  # it adds the bias itself
            return then(self._affine(x, None), self.bias)
        return then(self._affine(x, self.bias), None)

    def _affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.numel() // self.in_features
        plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        if plain or rows < _FEWEST or rows % _IMAGES or not is_amd():
            return F.linear(x, self.weight, bias)
        images = x.reshape(_IMAGES, 1, -1, self.in_features).permute(0, 3, 1, 2)  # channels last, in memory
        y = F.conv2d(images, self.weight[:, :, None, None], bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@torch.compiler.assume_constant_result
def is_amd() -> bool:
    """Whether this computer's CPU is one of AMD's, as Linux tells it."""
    return _asked()


@functools.cache
def _asked() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and b"AuthenticAMD" in info.read_bytes()
