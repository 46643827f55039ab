"""Optimizer: groups by name, schedules equal torch's own, state and averages that continue exactly."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.optim import (
    OptimConfig,
    Plateau,
    build_ema,
    build_optimizer,
    lr_factor,
    optimizer_tensors,
    parameter_groups,
    plateau_step,
    restore_ema,
    restore_optimizer,
    set_learning_rates,
)

CONFIG = OptimConfig(lr=0.01, ssm_lr=0.001, weight_decay=0.1)


class Toy(nn.Module):
    """Parameters of both kinds, and one that never sees a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)
        self.s4 = nn.ParameterDict({"P": torch.randn(4), "log_dt": torch.randn(4), "D": torch.randn(4)})
        self.idle = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3) -> scalar."""
        return ((self.linear(x) * self.s4["P"] * self.s4["log_dt"].exp() + self.s4["D"]) ** 2).mean()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Updates that depend on the step's number alone."""
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


# ---- groups


@pytest.mark.parametrize("mode", [{}, {"mode": "diag", "kernel": "vandermonde"}])
def test_state_space_parameters_have_their_own_rate_and_no_decay(mode: dict[str, Any]) -> None:
    """A, P, B and dt of every S4 layer get ssm_lr and no decay; C, D and all else lr and decay; nothing is left out.

    Mutation: drop "log_dt" (or any other) from SSM_PARAMETERS.
    """
    model = Sashimi(ModelConfig(d_model=4, n_layers=1, d_state=4, **mode))
    groups = {group["name"]: group for group in parameter_groups(model.named_parameters(), CONFIG)}
    assert (groups["main"]["lr"], groups["main"]["weight_decay"]) == (0.01, 0.1)
    assert (groups["ssm"]["lr"], groups["ssm"]["weight_decay"]) == (0.001, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    leaves = {key: {names[p].rpartition(".")[2] for p in group["params"]} for key, group in groups.items()}
    low_rank = set() if mode else {"P"}
    assert leaves["ssm"] == {"log_A_real", "A_imag", "B", "log_dt"} | low_rank
    assert leaves["main"] == {"weight", "bias", "C", "D"}
    assert sum(len(group["params"]) for group in groups.values()) == len(names)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    """Mutation: drop the filter on requires_grad, or the one on empty groups."""
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model.named_parameters(), CONFIG)
    assert group["name"] == "main"
    assert len(group["params"]) == 1


# ---- schedules


@pytest.mark.parametrize("min_lr", [0.0, 0.05])
def test_plateau_equals_torch(min_lr: float) -> None:
    """The factor follows torch's ReduceLROnPlateau over noisy, flat, NaN and falling losses, through JSON each time.

    Mutation: `<=` for `<` in the patience, or an absolute threshold.
    """
    config = OptimConfig(plateau_patience=2, plateau_factor=0.3, plateau_threshold=0.01, min_lr=min_lr)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=2, threshold=0.01, min_lr=2.0 * min_lr
    )
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    losses = [math.nan] + [3 * 0.99**i + 0.2 * x for i, x in enumerate(noise)] + [math.nan, 0.5] + [0.5] * 20
    state = Plateau()
    for loss in losses:
        state = Plateau(**json.loads(json.dumps(plateau_step(state, loss, config)._asdict())))
        theirs.step(loss)
        assert 2.0 * lr_factor(0, 1, state, config) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-7
        )
        assert state.bad == theirs.num_bad_epochs
    assert state.factor <= max(0.3**4, min_lr)


def test_cosine_with_warm_up_equals_torch() -> None:
    """Linear warm-up, then half a cosine down to min_lr, where it stays.

    Mutation: leave the warm-up out of the cosine's progress.
    """
    config = OptimConfig(schedule="cosine", warmup_steps=10, min_lr=0.1)
    factors = [lr_factor(step, 110, Plateau(), config) for step in range(130)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    for factor in factors[10:110]:
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert factors[110:] == pytest.approx([0.1] * 20)


def test_constant_keeps_the_rates_after_warm_up() -> None:
    """And every group is scaled from its own initial rate. Mutation: multiply group["lr"] by the factor."""
    config = OptimConfig(lr=0.01, ssm_lr=0.001, schedule="constant", warmup_steps=4)
    optimizer = build_optimizer(Toy().named_parameters(), config)
    for step, expected in ((0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (10**7, 1.0)):
        set_learning_rates(optimizer, lr_factor(step, 100, Plateau(), config))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"main": 0.01 * expected, "ssm": 0.001 * expected})


# ---- continuing


def test_restored_optimizer_continues_bit_equal() -> None:
    """Law 12. AdamW's state by name, two groups: 5 steps, restore elsewhere, 5 more = 10 steps, to the last bit.

    A parameter without a gradient so far has no state, before and after. Mutation: skip the "step" tensors.
    """
    unbroken, broken = Toy(), Toy()
    optimizer = build_optimizer(unbroken.named_parameters(), CONFIG)
    advance(unbroken, optimizer, range(10))

    first = build_optimizer(broken.named_parameters(), CONFIG)
    advance(broken, first, range(5))
    tensors = optimizer_tensors(first, broken.named_parameters())
    assert tensors["s4.P/step"] == 5
    assert not any(name.startswith("idle") for name in tensors)
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())

    resumed = Toy()
    resumed.load_state_dict(broken.state_dict())
    second = build_optimizer(resumed.named_parameters(), CONFIG)
    restore_optimizer(second, resumed.named_parameters(), tensors)
    advance(resumed, second, range(5, 10))
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    expected, got = (optimizer_tensors(o, m.named_parameters()) for o, m in ((optimizer, unbroken), (second, resumed)))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_restore_before_the_first_step_is_a_fresh_start() -> None:
    """No tensors, no state. Mutation: return early without clearing a state that is there."""
    model = Toy()
    optimizer = build_optimizer(model.named_parameters(), CONFIG)
    assert optimizer_tensors(optimizer, model.named_parameters()) == {}
    advance(model, optimizer, range(2))
    restore_optimizer(optimizer, model.named_parameters(), {})
    assert optimizer_tensors(optimizer, model.named_parameters()) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"other.weight/step": torch.tensor(1.0)}), "other.weight"),
        (lambda t: t.pop("s4.P/exp_avg"), "s4.P: exp_avg missing"),
        (lambda t: t.update({"s4.P/exp_avg": torch.zeros(7)}), r"s4.P/exp_avg: shape \[7\]"),
    ],
)
def test_state_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    """Mutation: drop the check of that name from `restore_optimizer`."""
    model = Toy()
    optimizer = build_optimizer(model.named_parameters(), CONFIG)
    advance(model, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, model.named_parameters())
    change(tensors)
    with pytest.raises(InputError, match=message):
        restore_optimizer(optimizer, model.named_parameters(), tensors)


def test_restored_average_continues_bit_equal() -> None:
    """Law 12 for the averaged weights, which also follow their definition.

    Mutations: leave `n_averaged` at 0 in `restore_ema` (the next update then copies the weights); `+ 1` -> `+ 2`.
    """
    model = Toy()
    optimizer = build_optimizer(model.named_parameters(), CONFIG)
    ema, past = build_ema(model, 0.9), []
    for step in range(6):
        advance(model, optimizer, range(step, step + 1))
        ema.update_parameters(model)
        past.append(model.linear.weight.detach().clone())
        if step == 2:
            saved, resumed = {k: v.clone() for k, v in ema.module.state_dict().items()}, build_ema(Toy(), 0.9)
            restore_ema(resumed, saved, updates=3)
        if step > 2:
            resumed.update_parameters(model)
    shares = [0.9**since for since in reversed(range(6))]
    expected = sum(share * weight for share, weight in zip(shares, past, strict=True)) / sum(shares)
    torch.testing.assert_close(ema.module.linear.weight, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(v, resumed.module.state_dict()[k]) for k, v in ema.module.state_dict().items())


@pytest.mark.parametrize(
    "field",
    [
        {"lr": 0.0},
        {"ssm_lr": -1.0},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"warmup_steps": -1},
        {"min_lr": 2.0},
        {"plateau_factor": 1.0},
        {"plateau_patience": -1},
        {"clip": -1.0},
        {"ema": 1.0},
        {"lr": math.nan},
    ],
)
def test_values_out_of_range_are_named(field: dict[str, Any]) -> None:
    """Mutation: drop the check of any one field."""
    with pytest.raises(InputError, match=f"optim.{next(iter(field))}="):
        OptimConfig(**field)
