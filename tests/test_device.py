"""Placement without hardware: fake CUDA tensors have shapes, dtypes and a device, and refuse to mix devices.

PyTorch's autograd engine wants a real driver behind "cuda", so the training step runs in a process of its own, on
a device type that PyTorch lets Python register.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import sashimi
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective, Rows
from sashimi.stream import Batch

RECIPES: dict[str, dict[str, Any]] = {
    "sashimi": {},
    "unet of the original": {"unet": True, "tie_state": False, "norm": "scalar", "weight_norm": True},
    "softplus": {"dt_transform": "softplus", "glu": False},
    "diagonal": {"mode": "diag", "kernel": "vandermonde"},
    "cauchy": {"kernel": "cauchy"},
}
LENGTH = 38  # not a multiple of the pooling
SEGMENT = 48


def model_on(device: str, recipe: str) -> Sashimi:
    """A small model whose parameters are on a device; later tensors are on the CPU unless they say otherwise."""
    with torch.device(device):
        return Sashimi(ModelConfig(levels=16, d_model=8, n_layers=1, d_state=8, **RECIPES[recipe]))


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)


def assert_on(device: str, *values: Any) -> None:
    found = [t.device.type for value in values for t in tensors(value)]
    assert found
    assert set(found) == {device}


def test_fake_devices_do_not_mix() -> None:
    """What the tests below stand on: adding a CPU tensor to a fake CUDA one is an error."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"cuda:0.* cpu|two different devices"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_stays_on_the_device(recipe: str) -> None:
    """Forward of a model on CUDA makes every tensor there.

    Mutation: in cauchy_kernel, drop `device=C.device`; in UpPool.first, `torch.zeros(…)` instead of `new_zeros`.
    """
    with FakeTensorMode(), torch.no_grad():
        model = model_on("cuda", recipe)
        logits = model(torch.zeros(2, LENGTH, dtype=torch.int64, device="cuda"))
        assert_on("cuda", tuple(model.parameters()), logits)
        assert logits.shape == (2, LENGTH, 16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_generation_stays_on_the_device(recipe: str) -> None:
    """State, prefill and step likewise.

    Mutation: in S4.init_state, `recurrence.C.new_zeros(…)` -> `torch.zeros(…)`; in Pooled.init_state likewise.
    """
    with FakeTensorMode(), torch.no_grad():
        model = model_on("cuda", recipe)
        state = model.init_state(2)
        assert_on("cuda", state)
        for _ in range(5):
            logits, state = model.step(torch.zeros(2, dtype=torch.int64, device="cuda"), state)
            assert_on("cuda", logits, state)
        logits, state = model.prefill(torch.zeros(2, LENGTH, dtype=torch.int64, device="cuda"), state)
        assert_on("cuda", logits, state)
        assert logits.shape == (2, 16)


class Board:
    """What PyTorch asks of the module of a device type, here of one board."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Fake tensors hold no random numbers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def train_on_board(recipe: str, carry: bool) -> None:
    """Two segments, from a batch in memory on, and AdamW on fake tensors of the device type "board"."""
    with FakeTensorMode():
        model = model_on("board", recipe).train()
        if carry:
            model.recompute_layers()
        objective = Objective(model, carry)
        rows = Rows(objective.beginning)
        ids = torch.zeros(2, dtype=torch.int64)
        batch = Batch(torch.zeros(2, SEGMENT, dtype=torch.uint8), ids + SEGMENT, ids, ids > 0, 8, ())
        for _ in range(2):
            nats = rows.play(objective, batch, torch.device("board"))
            (nats / SEGMENT).backward()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        optimizer.step()
        assert_on("board", nats, rows.carried, tuple(model.parameters()), tuple(p.grad for p in model.parameters()))
        for state in optimizer.state.values():
            assert_on("board", state["exp_avg"], state["exp_avg_sq"])


def train_each_recipe_on_board() -> None:
    """The body of the process below, in which the device type is registered."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("board", backend_module=Board())
    for recipe in RECIPES:
        train_on_board(recipe, carry=False)
        train_on_board(recipe, carry=True)


def test_training_step_stays_on_the_device() -> None:
    """From the batch to AdamW, for every recipe, with gradients, moments and what is carried on the device too.

    Mutations: in cauchy_kernel, drop `device=C.device`; in Batch.mask, drop `device=self.samples.device`; in
    Objective, drop `device=tensors[0].device`.
    """
    root = Path(sashimi.__file__).parents[1]
    program = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n"
        "from test_device import train_each_recipe_on_board; train_each_recipe_on_board()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
