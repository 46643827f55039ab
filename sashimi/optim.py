"""The optimizer and what moves with it: parameter groups by name, learning-rate schedules, EMA, state by name.

A schedule is a pure function (step, plateau state) -> factor on every group's learning rate. The plateau state is
three numbers that every rank steps from the same reduced validation loss, so there is no scheduler object to prepare,
to save or to step once too often.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sashimi.errors import InputError

SSM_PARAMETERS = frozenset({"log_A_real", "A_imag", "P", "B", "log_dt"})  # A, P, B and dt of every S4 layer


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning-rate schedule, clipping and weight averaging."""

    lr: float = 0.004
    """Learning rate of everything but the state-space parameters."""
    ssm_lr: float = 0.001
    """Learning rate of A, P, B and dt of every S4 layer. These never get weight decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of everything but the state-space parameters, in units of the learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's running means of the gradient and of its square, per step."""
    schedule: Literal["constant", "cosine", "plateau"] = "plateau"
    """What follows the warm-up: constant; cosine down to `min_lr` at the last step; or plateau, which multiplies the
    learning rates by `plateau_factor` whenever the validation loss has stopped falling."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise linearly from 0, under any schedule."""
    min_lr: float = 0.0
    """No schedule goes below this fraction of the learning rate."""
    plateau_factor: float = 0.2
    """Factor on the learning rates at each plateau."""
    plateau_patience: int = 20
    """Evaluations without improvement that are borne; the one after them reduces the learning rates."""
    plateau_threshold: float = 1e-4
    """Relative fall of the validation loss that counts as an improvement."""
    clip: float = 0.0
    """Bound on the norm of the whole gradient; 0 is off."""
    ema: float = 0.0
    """Decay per step of the averaged weights that validation, sampling and export then use; 0 is off."""

    def __post_init__(self) -> None:
        for name in ("lr", "ssm_lr", "plateau_factor"):
            if not getattr(self, name) > 0:
                raise InputError(f"optim.{name}={getattr(self, name)}: must be above 0")
        for name in ("weight_decay", "warmup_steps", "plateau_patience", "plateau_threshold", "clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optim.{name}={getattr(self, name)}: must be 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas={list(self.betas)}: both must be in [0, 1)")
        if not 0 <= self.ema < 1:
            raise InputError(f"optim.ema={self.ema}: must be in [0, 1); 0 is off, 0.999 a common choice")
        if not 0 <= self.min_lr <= 1:
            raise InputError(f"optim.min_lr={self.min_lr}: a fraction of the learning rate, must be in [0, 1]")
        if self.plateau_factor >= 1:
            raise InputError(f"optim.plateau_factor={self.plateau_factor}: must be below 1")


# ---- parameter groups


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, told apart by the last part of each parameter's name.

    "ssm" holds A, P, B and dt (`ssm_lr`, no decay), "main" all else. Parameters that need no gradient are left out,
    and so is an empty group. `initial_lr` is what `set_learning_rates` multiplies.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    ssm = [p for name, p in trained if name.rpartition(".")[2] in SSM_PARAMETERS]
    main = [p for name, p in trained if name.rpartition(".")[2] not in SSM_PARAMETERS]
    groups = [
        {"name": "main", "params": main, "lr": config.lr, "weight_decay": config.weight_decay},
        {"name": "ssm", "params": ssm, "lr": config.ssm_lr, "weight_decay": 0.0},
    ]
    return [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `fused`: in one kernel, for gradients that lie as autograd lays them."""
    return torch.optim.AdamW(parameter_groups(named_parameters, config), betas=config.betas, fused=fused or None)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


# ---- schedules


class Plateau(NamedTuple):
    """What a plateau schedule remembers; `_asdict()` is JSON and `Plateau(**that)` the way back."""

    best: float | None = None  # lowest validation loss so far
    bad: int = 0  # evaluations since, without improvement
    factor: float = 1.0  # on the learning rates


def plateau_step(state: Plateau, loss: float, config: OptimConfig) -> Plateau:
    """The state after one evaluation: torch's ReduceLROnPlateau (mode min, relative threshold, no cool-down).

    A NaN loss is not an improvement. `loss` must be the same number on every rank.
    """
    best = math.inf if state.best is None else state.best
    if loss < best * (1 - config.plateau_threshold):
        return state._replace(best=loss, bad=0)
    if state.bad < config.plateau_patience:
        return state._replace(bad=state.bad + 1)
    return state._replace(bad=0, factor=max(state.factor * config.plateau_factor, config.min_lr))


def lr_factor(step: int, total_steps: int, plateau: Plateau, config: OptimConfig) -> float:
    """Factor on the learning rates for the update that follows `step` finished ones, of `total_steps` in all."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "plateau":
        return warmup * plateau.factor
    if config.schedule == "constant" or step < config.warmup_steps:
        return warmup
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ---- averaged weights


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Averaged weights of `model`: call `update_parameters(model)` after each update, evaluate with `.module`.

    Each update's weights count `decay` to the power of the updates since then, divided by the sum of all these powers:
    else those of the first update would be a third of the average after 1 / (1 - decay) of them. Buffers are copied.
    """

    def average(averages: Any, weights: Any, n: Any) -> None:
        part = (1 - decay) / (1 - decay ** (int(n) + 1))  # of the newest weights
        get_ema_multi_avg_fn(1 - part)(averages, weights, n)

    return AveragedModel(model, multi_avg_fn=average)


def restore_ema(ema: AveragedModel, tensors: Mapping[str, Tensor], updates: int) -> None:
    """Continue an average: `tensors` is a former `ema.module.state_dict()`, `updates` the number made until then."""
    ema.module.load_state_dict(tensors)
    ema.n_averaged.fill_(updates)


# ---- optimizer state, keyed by parameter name


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors on the CPU: "layers.0.weight/exp_avg", "layers.0.weight/step", ...

    A parameter that has seen no gradient yet has no entry.
    """
    return {
        f"{name}/{key}": value.detach().cpu()
        for name, parameter in named_parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` returned: the next updates are bit-equal to those of an unbroken run.

    Hyperparameters stay as they are in `optimizer`. InputError for a name that the model does not have, for a
    parameter with only a part of its state and for a wrong shape.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in tensors.items():
        name, _, key = entry.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    keys = {key for state in by_name.values() for key in state}
    names = {parameter: name for name, parameter in named_parameters}

    packed = optimizer.state_dict()
    packed["state"] = {}
    for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        for parameter, index in zip(group["params"], packed_group["params"], strict=True):
            name = names[parameter]
            if name not in by_name:
                continue
            state = packed["state"][index] = by_name.pop(name)
            if missing := sorted(keys - state.keys()):
                raise InputError(f"optimizer state of {name}: {', '.join(missing)} missing; use another checkpoint")
            for key, tensor in state.items():
                if tensor.dtype not in (torch.float32, torch.float64) or not tensor.isfinite().all():
                    raise InputError(
                        f"optimizer state {name}/{key}: {tensor.dtype}, or not finite; use another checkpoint"
                    )
                if key != "step" and tensor.shape != parameter.shape:
                    raise InputError(
                        f"optimizer state {name}/{key}: shape {list(tensor.shape)}, but the parameter has "
                        f"{list(parameter.shape)}; the checkpoint is of another model"
                    )
    if by_name:
        raise InputError(
            f"optimizer state of {', '.join(sorted(by_name)[:3])} ({len(by_name)} in all): not trained by this run; "
            "the checkpoint is of another model, so start from its weights with --init-from"
        )
    optimizer.load_state_dict(packed)
