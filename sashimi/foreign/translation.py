"""The tools of translating a state dict: every key read with the shape it must have, C̃ turned into C.

Shapes: **H** channels, **N** real state, M = N/2 complex modes.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sashimi.errors import InputError
from sashimi.foreign import legacy
from sashimi.model import ModelConfig, Sashimi
from sashimi.s4 import S4

KNOWN = "known are SaShiMi checkpoints of state-spaces/s4 version 2 and 4, and seed796"


class Imported(NamedTuple):
    """A checkpoint as a model of ours."""

    format: str  # "sashimi", or one of legacy.FORMATS
    origin: str  # what it was recognized as, for people
    config: ModelConfig
    tensors: dict[str, Tensor]  # float32, by the names of the model's state_dict()
    notes: tuple[str, ...]  # what no tensor tells, or what was changed

    def architecture(self) -> str:
        """One line for people."""
        c, pools = self.config, ", ".join(map(str, self.config.pool))
        return (
            f"d_model {c.d_model}, {c.n_layers} layers a tier, pool [{pools}], expand {c.expand}, ff {c.ff}, "
            f"d_state {c.d_state}, {'' if c.tie_state else 'un'}tied, {'' if c.glu else 'no '}GLU, {c.norm} norm"
        )


class Translation:
    """Reads a state dict key by key, each with the shape that it must have, and collects ours.

    Tensors are float64 on the way. A linear or affine map is named by the prefix of its weight and bias.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.unread = dict.fromkeys(state)
        self.tensors: dict[str, Tensor] = {}
        self.lengths: dict[str, int] = {}  # l of C̃ by the name of the S4 layer; 0: C itself is stored
        self.notes: list[str] = []

    def shape(self, key: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that tells how large the model is."""
        shape = tuple(self._find(key).shape)
        if len(shape) != dims or 0 in shape:
            raise InputError(f"{key} is {list(shape)}, expected {dims} dimensions; {KNOWN}")
        return shape

    def ratio(self, key: str, axis: int, unit: int) -> int:
        """How many times `unit` a dimension of a matrix is."""
        n = self.shape(key, 2)[axis]
        if n % unit:
            raise InputError(f"{key} is {list(self.state[key].shape)}: {n} is no multiple of {unit}")
        return n // unit

    def indices(self, prefix: str) -> list[int]:
        """The numbers that follow `prefix` in keys, sorted."""
        found = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in self.state)
        return sorted({int(match[1]) for match in found if match})

    def read(self, key: str, *shape: int) -> Tensor:
        """A real tensor, reshaped if it differs from `shape` by dimensions of size 1 only."""
        value = self._find(key)
        real = value.is_floating_point() or (not shape and not value.is_complex())  # a length is a whole number
        if [n for n in value.shape if n != 1] != [n for n in shape if n != 1] or not real:
            raise InputError(f"{key} is {list(value.shape)} {value.dtype}, expected real {list(shape)}")
        value = value.double()
        if not value.isfinite().all():
            raise InputError(f"{key} holds NaN or infinity; import an earlier checkpoint")
        self.skip(key)
        return value.reshape(shape)

    def skip(self, *keys: str) -> None:
        """Tensors that follow from others."""
        for key in keys:
            self.unread.pop(key, None)

    def affine(self, target: str, key: str, *shape: int) -> None:
        """Weight of `shape` and bias of its first dimension."""
        self.tensors[f"{target}weight"] = self.read(f"{key}weight", *shape)
        self.tensors[f"{target}bias"] = self.read(f"{key}bias", shape[0])

    def finish(self, format: str, origin: str, config: ModelConfig) -> Imported:
        """All keys read, or InputError. Turns C̃ into C with the model's own discretization."""
        if self.unread:
            raise InputError(f"{len(self.unread)} unknown keys, first {next(iter(self.unread))}; {KNOWN}")
        with torch.random.fork_rng(devices=[]):
            model = (Sashimi(config) if format == "sashimi" else legacy.build(format, config)).double()
        model.load_state_dict(self.tensors)
        for name, length in self.lengths.items():
            s4 = model.get_submodule(name)
            assert isinstance(s4, S4)
            s4.C.data = _untruncated(s4, length, name)
        return Imported(format, origin, config, model.float().state_dict(), tuple(self.notes))

    def _find(self, key: str) -> Tensor:
        if key not in self.state:
            place = key[: key.rindex(".") + 1]
            beside = [other.removeprefix(place) for other in self.state if other.startswith(place)]
            hint = f" (beside {', '.join(beside[:8])})" if beside else ""
            raise InputError(f"{key} is missing{hint}; {KNOWN}")
        return self.state[key]


@torch.no_grad()
def _untruncated(s4: S4, length: int, name: str) -> Tensor:
    """C of C̃ = C (I − A^length), solved in the real N × N system: (H, M, 2). `name` goes into the error."""
    if length == 0:
        return s4.C
    A = s4.recurrence().dense()
    truncation = torch.eye(A.shape[-1], dtype=A.dtype) - torch.linalg.matrix_power(A, length)
    row = torch.cat((s4.C[..., 0], -s4.C[..., 1]), dim=-1)  # the functional of C̃, up to a factor
    solution, singular = torch.linalg.solve_ex(truncation.mT, row.unsqueeze(-1))
    if singular.any() or not solution.float().isfinite().all():
        raise InputError(f"{name}: A^{length} overflows or is the identity, so that C cannot be recovered")
    re, im = solution.squeeze(-1).chunk(2, dim=-1)
    return torch.stack((re, -im), dim=-1)


def conjugate(pairs: Tensor) -> Tensor:
    """Complex numbers as (real, imaginary) pairs: (..., 2) -> (..., 2)."""
    return pairs * torch.tensor([1.0, -1.0], dtype=pairs.dtype)
