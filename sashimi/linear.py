"""Linear layers over sequences, with the activations before and after them."""

import torch.nn.functional as F
from torch import Tensor, nn

from sashimi.native.linear import linear, serves


class Linear(nn.Linear):
    """nn.Linear. On CPUs, in float32, what is long is done by compiled code."""

    def forward(self, x: Tensor, gelu: bool = False, glu: bool = False) -> Tensor:
        """The layer of GELU(x), if `gelu`, and if `glu` the GLU of that.

        x: (..., in_features) -> (..., out_features), or half of them.
        """
        weight, bias = self.weight, self.bias  # once, as it may be computed each time
        if bias is not None and serves(x, weight, glu):
            return linear(x, weight, bias, gelu, glu)
        y = F.linear(F.gelu(x) if gelu else x, weight, bias)
        return F.glu(y, dim=-1) if glu else y
