"""Models of other code's making that the core cannot hold: built for imported checkpoints, for inference only.

    s4-unconstrained   the original code before "hurwitz": A = diag(Λ) − P Q*, with Re Λ and Q free
    seed796            a student re-implementation: complex modes without conjugates, other layers around them

Shapes: **B** batch, **L** samples, **H** channels, **N** real state, N/2 complex modes.
`sashimi.foreign.importer` fills them; `sashimi.load_model` finds them through `build`. Nothing else knows them.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sashimi import ssm
from sashimi.errors import InputError
from sashimi.layers import FeedForward, S4Block, UpPool
from sashimi.linear import Linear
from sashimi.model import ModelConfig, Parts, Sashimi, Tier
from sashimi.s4 import S4


class InferenceOnly(Sashimi):
    """A model that may not be stable under updates: it refuses training mode and gradients."""

    format: ClassVar[str]
    inference_only: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """InputError unless `mode` is false."""
        self._refuse(mode)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """InputError unless `requires_grad` is false."""
        self._refuse(requires_grad)
        return super().requires_grad_(requires_grad)

    def _refuse(self, training: bool) -> None:
        if training:
            raise InputError(
                f"format={self.format}: an imported model of this kind is inference-only, nothing keeps it stable in "
                "training; sample or evaluate it, or train from a model of format sashimi"
            )


# --- the original code's unconstrained state matrix --------------------------------------------------------


class UnconstrainedS4(S4):
    """A = diag(Λ) − P Q* with Λ, P and Q free: stable only as far as it was trained to be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.P is not None, "needs mode dplr"
        self.Lambda = _free_eigenvalues(self)  # (S, N/2, 2)
        self.Q = nn.Parameter(self.P.detach().clone())  # (S, N/2, 2)

    def system(self) -> ssm.System:
        """The continuous system in complex numbers."""
        assert self.P is not None
        pairs = (self.Lambda, self.P, self.Q, self.B, self.C)
        Lambda, P, Q, B, C = map(torch.view_as_complex, pairs)
        return ssm.System(Lambda, P, Q, B, C, ssm.time_step(self.log_dt, self.dt_transform))


class Unconstrained(InferenceOnly):
    """SaShiMi over `UnconstrainedS4`: the released checkpoints with "hurwitz: false"."""

    format = "s4-unconstrained"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Parts(s4=UnconstrainedS4))


# --- the student re-implementation -------------------------------------------------------------------------


class UnpairedRecurrence(ssm.Recurrence):
    """A recurrence of N/2 complex modes without their conjugates: z' = diag(decay) z − α (β z) + B u, y = Re(C z).

    The fields hold complex vectors as real ones: a = [Re α, Im α], b = [Re β, −Im β], likewise B and C. The low-rank
    term is linear over the complex numbers, thus of rank 2 over the real ones. All but C may have H = 1.
    """

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One sample. u: (B, H), x: (B, H, N) -> y (B, H), next x (B, H, N)."""
        assert self.a is not None
        assert self.b is not None
        re, im = x.chunk(2, dim=-1)
        b_re, b_im = self.b.chunk(2, dim=-1)
        s_re = (b_re * re + b_im * im).sum(-1, keepdim=True)
        s_im = (b_re * im - b_im * re).sum(-1, keepdim=True)
        a_re, a_im = self.a.chunk(2, dim=-1)
        next_re = self.decay_real * re - self.decay_imag * im - a_re * s_re + a_im * s_im
        next_im = self.decay_real * im + self.decay_imag * re - a_re * s_im - a_im * s_re
        x = torch.cat((next_re, next_im), dim=-1) + self.B * u.unsqueeze(-1)
        return (self.C * x).sum(-1), x

    def dense(self) -> Tensor:
        """The matrix A: (H or 1, N, N)."""
        assert self.a is not None
        assert self.b is not None
        a_re, a_im = self.a.chunk(2, dim=-1)
        b_re, b_im = self.b.chunk(2, dim=-1)
        A = torch.diag_embed(torch.complex(self.decay_real, self.decay_imag))
        A = A - torch.complex(a_re, a_im).unsqueeze(-1) * torch.complex(b_re, -b_im).unsqueeze(-2)
        return torch.cat((torch.cat((A.real, -A.imag), dim=-1), torch.cat((A.imag, A.real), dim=-1)), dim=-2)


def discretize_unpaired(system: ssm.System) -> UnpairedRecurrence:
    """`ssm.discretize` of z' = Λ z − P (Q* z) + B u, y = Re(C z): bilinear, in Woodbury form."""
    assert system.P is not None
    assert system.Q is not None
    dt = system.dt.unsqueeze(-1)
    G = 1 / (1 - 0.5 * dt * system.Lambda)
    decay = 2 * G - 1
    b = system.Q.conj() * G
    a = dt * G * system.P / (1 + 0.5 * dt * (b * system.P).sum(-1, keepdim=True))
    B = dt * G * system.B - 0.5 * dt * a * (b * system.B).sum(-1, keepdim=True)
    b_row, C_row = (0.5 * ssm.real_functional(row) for row in (b, system.C))
    return UnpairedRecurrence(decay.real, decay.imag, ssm.real_vector(a), b_row, ssm.real_vector(B), C_row)


class UnpairedS4(S4):
    """N/2 complex modes without their conjugates, the output's real part taken; Λ is free, Q = P, one dt a layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.Lambda = _free_eigenvalues(self)  # (S, N/2, 2)
        self.log_dt = nn.Parameter(self.log_dt.detach()[:1].clone())  # (1,)
        assert self.kernel_name == "krylov"

    def system(self) -> ssm.System:
        """The continuous system in complex numbers; it has no conjugate half."""
        assert self.P is not None
        Lambda, P, B, C = map(torch.view_as_complex, (self.Lambda, self.P, self.B, self.C))
        return ssm.System(Lambda, P, P, B, C, ssm.time_step(self.log_dt, self.dt_transform))

    def recurrence(self) -> UnpairedRecurrence:
        """The discrete system in real numbers."""
        return discretize_unpaired(self.system())


class UngatedFirst(S4Block):
    """S4 → GELU → Linear, but with `glu` S4 → Linear → GLU: the gate replaces the GELU."""

    def mix(self, y: Tensor) -> Tensor:
        """y: (..., H) -> (..., H)."""
        return self.output(y, gelu=not self.glu, glu=self.glu)


class GatedFeedForward(FeedForward):
    """Linear (×2·ff) → GLU → Linear."""

    def __init__(self, d_model: int, ff: int) -> None:
        super().__init__(d_model, ff)
        self.expand = Linear(d_model, 2 * ff * d_model)

    def forward(self, x: Tensor, state: None = None, made: None = None) -> tuple[Tensor, None]:
        """x: (..., H) -> (..., H)."""
        return self.contract(self.expand(x, glu=True)), None


class ShiftedFirst(UpPool):
    """The shift comes before the Linear: the block at a recording's start is the Linear's of zeros, its bias."""

    def first(self, batch_size: int) -> Tensor:
        """The block at a recording's start: (B, H, p)."""
        bias = self.linear.bias
        return self.step(bias.new_zeros(batch_size, self.linear.in_features))


class Seed796(InferenceOnly):
    """The student re-implementation: as SaShiMi, but for the layers above, no final norm, and a skip around all the
    layers of a tier at the centre only."""

    format = "seed796"

    def __init__(self, config: ModelConfig) -> None:
        if config.kernel != "krylov":
            raise InputError(f"model.kernel={config.kernel}: format {self.format} has krylov only")
        feed_forward = GatedFeedForward if config.glu else FeedForward
        super().__init__(config, Parts(UnpairedS4, UngatedFirst, feed_forward, ShiftedFirst))
        self.norm = nn.Identity()
        for module in self.modules():
            if isinstance(module, Tier):
                module.outer_skip = module.pooled is None


# --- finding them ------------------------------------------------------------------------------------------

_MODELS: tuple[type[Unconstrained] | type[Seed796], ...] = (Unconstrained, Seed796)
FORMATS = tuple(model.format for model in _MODELS)


def build(format: str, config: ModelConfig) -> InferenceOnly:
    """An eval-mode model of one of `FORMATS`, its weights still to be loaded. InputError for any other format."""
    for model in _MODELS:
        if model.format == format:
            return model(config)
    raise InputError(f"format={format!r}: this version knows sashimi, {', '.join(FORMATS)}")


def _free_eigenvalues(s4: S4) -> nn.Parameter:
    """Replace the stable parameters of Λ by Λ itself: (S, N/2, 2)."""
    Lambda = torch.stack((-torch.exp(s4.log_A_real.detach()), s4.A_imag.detach()), dim=-1)
    del s4.log_A_real, s4.A_imag
    return nn.Parameter(Lambda)
