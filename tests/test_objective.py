"""Law 2 of training and evaluation in segments, and what a row carries from one to the next."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trained_like import relative, trained_like

import sashimi.objective as objectives
import sashimi.scan as chunked
from sashimi.foreign import legacy
from sashimi.loss import nll
from sashimi.model import ModelConfig, Sashimi, SashimiState
from sashimi.objective import Objective, Rows, _with_tensors, divide_rows, join_rows
from sashimi.order import rank_positions
from sashimi.stream import Batch

SMALL: dict[str, Any] = {"levels": 16, "d_model": 8, "n_layers": 2, "d_state": 8, "pool": (2, 4)}
RECIPES: dict[str, dict[str, Any]] = {
    "sashimi": {},
    "no glu": {"glu": False},
    "unet of the original": {"unet": True, "tie_state": False, "norm": "scalar", "weight_norm": True},
    "diagonal": {"mode": "diag", "kernel": "vandermonde"},
    "cauchy": {"kernel": "cauchy"},
    "no pool": {"pool": ()},
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short segment has several chunks."""
    monkeypatch.setattr(chunked, "chunk_length", lambda samples: 16)


def model(recipe: str = "sashimi", dtype: torch.dtype = torch.float64) -> Sashimi:
    torch.manual_seed(0)
    config = ModelConfig(**SMALL | RECIPES.get(recipe, {}))
    made = legacy.build(recipe, config) if recipe in legacy.FORMATS else Sashimi(config)
    return trained_like(made, scale=0.1).to(dtype).eval()


def recording(length: int, rows: int = 2) -> Tensor:
    return torch.randint(16, (rows, length), generator=torch.Generator().manual_seed(1))


def batch(targets: Tensor, first: int | None = None, resets: Sequence[bool] = (False, False)) -> Batch:
    """Two rows, of which the first has so many samples to score; not given: all of them."""
    samples = torch.tensor([targets.shape[1] if first is None else first, targets.shape[1]])
    return Batch(targets.to(torch.uint8), samples, torch.zeros(2), torch.tensor(resets), 8, ())


def whole_nats(sashimi: Sashimi, targets: Tensor, start: int = 0) -> float:
    """Of the samples from `start` on, by one forward over all of them."""
    played = batch(targets)
    mask = torch.arange(targets.shape[1]).expand_as(targets) >= start
    with torch.no_grad():
        return float(nll(sashimi(played.inputs), targets, mask)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("recipe", [*RECIPES, *legacy.FORMATS])
def test_segments_are_the_whole(recipe: str, dtype: torch.dtype, tolerance: float) -> None:
    """The nats of consecutive segments, of several lengths, are those of the whole recording, each for itself.

    Mutations: in Objective.forward, drop the `cat` of the last level; in `_with_tensors`, keep `pooled.current`.
    """
    sashimi, targets = model(recipe, dtype), recording(208)
    objective = Objective(sashimi, carry=True)
    rows, start = Rows(objective.beginning), 0
    with torch.no_grad():
        for length in (64, 8, 40, 96):
            nats = float(rows.play(objective, batch(targets[:, start : start + length]), CPU))
            end = start + length
            expected = whole_nats(sashimi, targets[:, :end]) - (whole_nats(sashimi, targets[:, :start]) if start else 0)
            assert nats == pytest.approx(expected, rel=tolerance)
            start = end


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "cauchy"])
def test_gradients_go_through_the_segment_alone(recipe: str) -> None:
    """They are those of the recurrence, sample by sample, from what was carried into the segment as a constant, by the
    parameters as they are now.

    Mutations: in S4.forward, `self.recurrence()` -> `state.recurrence`; in UpPool.forward, `blocks[:, :-1].detach()`;
    in Chunks.backward, zeros for `d_states`.
    """
    sashimi, targets = model(recipe), recording(96)
    objective = Objective(sashimi, carry=True)
    rows = Rows(objective.beginning)
    rows.play(objective, batch(targets[:, :48]), CPU)
    with torch.no_grad():
        for parameter in sashimi.parameters():
            parameter *= 1.01  # an update
    last, *tensors = rows.carried
    assert not any(tensor.requires_grad for tensor in tensors)
    parameters = list(sashimi.parameters())
    second = batch(targets[:, 48:])
    actual = torch.autograd.grad(rows.play(objective, second, CPU), parameters)

    state = SashimiState(_with_tensors(sashimi.init_state(2).tier, iter(tensors)), 0)
    outputs = []
    for sample in torch.cat((last[:, None], second.inputs[:, 1:]), dim=1).unbind(1):
        logits, state = sashimi.step(sample, state)
        outputs.append(logits)
    nats, _ = nll(torch.stack(outputs, dim=1), second.targets, second.mask)
    for gradient, expected in zip(actual, torch.autograd.grad(nats, parameters), strict=True):
        assert relative(gradient, expected) < 1e-8


@pytest.mark.parametrize("why", ["reset", "ended", "damaged", "not finite"])
def test_a_row_begins_anew(why: str) -> None:
    """Where it resets; after the end of a recording, after damage or filler, and after what is not finite. The row
    beside it goes on.

    Mutations: in Rows.play, `resets` all False; `goes_on` all True; `goes_on` without `isfinite`.
    """
    sashimi, targets = model(), recording(96)
    objective = Objective(sashimi, carry=True)
    rows = Rows(objective.beginning)
    with torch.no_grad():
        rows.play(objective, batch(targets[:, :48], {"ended": 40, "damaged": 0}.get(why)), CPU)
        if why == "not finite":
            healthy = sashimi.embedding.weight.clone()
            rows = Rows(objective.beginning)
            sashimi.embedding.weight[5] = torch.inf
            spoilt = targets[:, :48].clone()
            spoilt[0, 3], spoilt[1] = 5, torch.where(spoilt[1] == 5, 6, spoilt[1])
            rows.play(objective, batch(spoilt), CPU)
            sashimi.embedding.weight.copy_(healthy)
            targets = torch.cat((spoilt, targets[:, 48:]), dim=1)
        nats = float(rows.play(objective, batch(targets[:, 48:], resets=(why == "reset", False)), CPU))
    expected = whole_nats(sashimi, targets[:1, 48:]) + whole_nats(sashimi, targets[1:], start=48)
    assert nats == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "cauchy"])
def test_pieces_and_layers_computed_once_more_change_nothing(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nats and gradients are those of all logits at once; and a small part is kept for the gradient.

    Mutations: in _nats, `pieces[1:]`; recompute_layers that sets False.
    """
    sashimi, targets = model(recipe), recording(96)
    played = batch(targets)
    held = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.numel()
        return tensor

    def gradients(nats: Callable[[], Tensor]) -> tuple[float, tuple[Tensor, ...], int]:
        nonlocal held
        held = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            value = nats()
        return float(value.detach()), torch.autograd.grad(value, list(sashimi.parameters())), held

    def at_once() -> Tensor:
        return nll(sashimi(played.inputs), played.targets, played.mask)[0]

    expected, expected_gradients, all_held = gradients(at_once)
    monkeypatch.setattr(objectives, "_PIECE", 50)
    sashimi.recompute_layers()
    nats, actual, kept = gradients(lambda: Objective(sashimi)(played.inputs, played.targets, played.mask))
    assert nats == pytest.approx(expected, rel=1e-12)
    assert kept < 0.3 * all_held
    for gradient, other in zip(actual, expected_gradients, strict=True):
        assert relative(gradient, other) < 1e-12


def test_without_carry_each_segment_is_by_itself() -> None:
    """Whatever was played before. Mutation: in Rows.play, drop the early return."""
    sashimi, targets = model(), recording(96)
    objective = Objective(sashimi)
    rows = Rows(objective.beginning)
    with torch.no_grad():
        rows.play(objective, batch(targets[:, :48]), CPU)
        assert float(rows.play(objective, batch(targets[:, 48:]), CPU)) == whole_nats(sashimi, targets[:, 48:])
    assert rows.carried == ()


def divisions(rows: int) -> Iterator[tuple[int, int, int]]:
    """(micro_batch, accumulation, world_size) of all ways to divide so many rows."""
    for world_size in range(1, rows + 1):
        for accumulation in range(1, rows + 1):
            if rows % (world_size * accumulation) == 0:
                yield rows // (world_size * accumulation), accumulation, world_size


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.data())
def test_rows_are_divided_as_positions_are(rows: int, data: st.DataObject) -> None:
    """Joined by any ranks and divided among any others, row r is that of the r-th position of a global batch.

    Mutations: in join_rows, `argsort` dropped; in divide_rows, `rank` taken for 0.
    """
    beginning = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1))
    joined: dict[str, Tensor] = {"0000": torch.arange(rows), "0001": torch.arange(rows)[:, None] * 0.5}
    for _ in range(2):
        micro_batch, accumulation, world_size = data.draw(st.sampled_from(list(divisions(rows))))
        parts = []
        for rank in range(world_size):
            own = divide_rows(joined, beginning, micro_batch, accumulation, rank, world_size)
            assert np.array_equal(
                torch.stack([part[0] for part in own]), rank_positions(0, micro_batch, accumulation, rank, world_size)
            )
            parts += own
        joined = join_rows(parts, accumulation, world_size)
    assert joined["0000"].tolist() == list(range(rows))
    assert torch.equal(joined["0001"][:, 0], torch.arange(rows) * 0.5)
