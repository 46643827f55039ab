"""Laws 2 to 6 of whole models, their size, and what a configuration may say."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from precision import watched
from torch import Tensor
from trained_like import relative, trained_like

from sashimi import ssm
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.s4 import S4, S4State

SMALL: dict[str, Any] = {"levels": 16, "d_model": 8, "n_layers": 2, "d_state": 8}
ORIGINAL = {"norm": "scalar", "weight_norm": True}
RECIPES: dict[str, dict[str, Any]] = {
    "sashimi": {},
    "no glu": {"glu": False},
    "original norms": ORIGINAL,
    "unet": {"unet": True},
    "unet of the original": {"unet": True, "tie_state": False, **ORIGINAL},
    "untied softplus": {"tie_state": False, "dt_transform": "softplus"},
    "diagonal": {"mode": "diag", "kernel": "vandermonde"},
    "cauchy": {"kernel": "cauchy"},
    "three pools": {"pool": (2, 3, 2), "expand": 1, "ff": 1, "n_layers": 1},
    "unet of three pools": {"pool": (3, 2, 2), "unet": True, "n_layers": 1},
    "one pool": {"pool": (5,), "expand": 3},
    "no pool": {"pool": ()},
}
BACKBONES = ["sashimi", "unet"]


def model(recipe: str = "sashimi", dtype: torch.dtype = torch.float64) -> Sashimi:
    """A small eval-mode model with weights as after training."""
    torch.manual_seed(0)
    return trained_like(Sashimi(ModelConfig(**SMALL | RECIPES[recipe])), scale=0.1).to(dtype).eval()


def ids(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(sashimi: Sashimi, inputs: Tensor) -> Tensor:
    state, outputs = sashimi.init_state(len(inputs)), []
    for sample in inputs.unbind(1):
        logits, state = sashimi.step(sample, state)
        outputs.append(logits)
    return torch.stack(outputs, dim=1)


# --- law 2: forward is step --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_equals_step(recipe: str, dtype: torch.dtype, tolerance: float) -> None:
    """Law 2 for every causal recipe, at a length that no pooling divides.

    Mutations: in Pooled.step, `slot == self.pool - 1` -> `slot == 0`; in Tier.step, `skips.pop()` -> `skips.pop(0)`.
    """
    sashimi, inputs = model(recipe, dtype), ids(117)
    with torch.no_grad():
        assert relative(steps(sashimi, inputs), sashimi(inputs)) < tolerance


@pytest.mark.parametrize("recipe", RECIPES)
def test_tiers_forward_equals_step(recipe: str) -> None:
    """Law 2 tier by tier, innermost included. Mutation: in Pooled.step, `phase // self.pool` -> `phase`."""
    sashimi = model(recipe)
    pool, expand, tier = sashimi.config.pool, sashimi.config.expand, sashimi.tier
    for depth in range(len(pool) + 1):
        x = torch.randn(2, 4 * math.prod(pool[depth:]), 8 * expand**depth, dtype=torch.float64)
        with torch.no_grad():
            state, outputs = tier.init_state(2), []
            for phase, sample in enumerate(x.unbind(1)):
                y, state = tier.step(sample, state, phase)
                outputs.append(y)
            assert relative(torch.stack(outputs, dim=1), tier(x)[0]) < 1e-9
        assert (tier.pooled is None) == (depth == len(pool))
        tier = tier if tier.pooled is None else tier.pooled.tier


@pytest.mark.parametrize("recipe", RECIPES)
def test_prefill_continues_from_anywhere(recipe: str) -> None:
    """Law 2 of prefill: prompts of any length from any phase, steps between them, equal one forward.

    Mutations: in prefill, `head = min(-state.phase % total, …)` -> `0`; in Pooled.forward, `PooledState(…, current)`
    -> `PooledState(…, state.current)`.
    """
    sashimi = model(recipe)
    total = sashimi.config.total_pool
    inputs = ids(9 * total + 40)
    with torch.no_grad():
        expected = sashimi(inputs)
        for prompt in {1, max(total - 1, 1), total, total + 1, 3 * total + 2}:
            for more in (1, total, 2 * total + 5):
                logits, state = sashimi.prefill(inputs[:, :prompt], sashimi.init_state(2))
                assert relative(logits, expected[:, prompt - 1]) < 1e-9
                logits, state = sashimi.step(inputs[:, prompt], state)
                assert relative(logits, expected[:, prompt]) < 1e-9
                end = prompt + 1 + more
                logits, state = sashimi.prefill(inputs[:, prompt + 1 : end], state)
                assert relative(logits, expected[:, end - 1]) < 1e-9
                assert state.phase == end % total
                logits, state = sashimi.step(inputs[:, end], state)
                assert relative(logits, expected[:, end]) < 1e-9


@pytest.mark.parametrize("backbone", BACKBONES)
def test_prefill_in_pieces(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 2 of a prompt that prefill must cut into pieces. Mutation: in prefill, `features(…, state)` -> `first`."""
    monkeypatch.setattr("sashimi.model._SCAN_PIECE", 40)  # not a multiple of the total pooling of 16
    sashimi, inputs = model(backbone), ids(200)
    with torch.no_grad():
        logits, state = sashimi.prefill(inputs[:, :199], sashimi.init_state(2))
        assert relative(logits, sashimi(inputs)[:, 198]) < 1e-9
        assert relative(sashimi.step(inputs[:, 199], state)[0], sashimi(inputs)[:, 199]) < 1e-9


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_continue(backbone: str) -> None:
    """Law 2 of carried state: two calls give the logits of one forward. Mutation: `state and state.tier` -> `None`."""
    sashimi, inputs = model(backbone), ids(16 * 10)
    with torch.no_grad():
        first, state = sashimi.features(inputs[:, :48], sashimi.init_state(2))
        second, _ = sashimi.features(inputs[:, 48:], state)
        logits = sashimi.read_out(torch.cat((first, second), dim=1))
        assert relative(logits, sashimi(inputs)) < 1e-9


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(("unet", "layers"), [(False, 3 * 2), (True, (3 * 2 - 1) * 2)])
def test_a_tier_makes_its_kernels_or_systems_together(
    unet: bool, layers: int, chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are recomputed one by one; loss and gradients are the same.

    Mutations: in `Tier._make`, return {}, or only those of `self.layers`, or always all.
    """
    monkeypatch.setattr("sashimi.s4.in_chunks", lambda device: chunks)
    made, discretize = [], ssm.discretize
    monkeypatch.setattr(ssm, "discretize", lambda system: (made.append(system), discretize(system))[1])
    ids, results = torch.randint(16, (2, 24)), []
    for recompute, expected in ((False, 3), (True, 2 * layers)):
        torch.manual_seed(0)
        model = Sashimi(ModelConfig(levels=16, d_model=4, n_layers=2, d_state=4, pool=(2, 2), unet=unet)).double()
        if recompute:
            model.recompute_layers()
        made.clear()
        loss = model(ids).logsumexp(-1).sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert len(made) == expected
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-9


def test_prefill_refuses_an_empty_prompt() -> None:
    """An empty prompt has no logits. Mutation: drop the check (None is returned)."""
    sashimi = model()
    with pytest.raises(InputError, match="prompt is empty"):
        sashimi.prefill(ids(0), sashimi.init_state(2))


def test_steps_leave_the_state_they_were_given() -> None:
    """A state is a value: continuing twice from one state gives the same. Mutation: drop `.clone()` of pending."""
    sashimi = model()
    with torch.no_grad():
        _, state = sashimi.prefill(ids(19), sashimi.init_state(2))

        def continued(seed: int) -> Tensor:
            branch, outputs = state, []
            for sample in ids(20, seed=seed).unbind(1):
                logits, branch = sashimi.step(sample, branch)
                outputs.append(logits)
            return torch.stack(outputs)

        first, other, again = continued(2), continued(3), continued(2)
    assert torch.equal(again, first)
    assert not torch.equal(other, first)


# --- law 3: causality --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 7, 15])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_causality(backbone: str, place: int) -> None:
    """Law 3: sample t, which is inputs[t + 1], moves no logit at s ≤ t, and moves that of t + 1; t at the first,
    middle and last place of a pooled block.

    Mutation: in UpPool.forward, `blocks[:, :-1]` after the head -> the unshifted `blocks`.
    """
    sashimi, inputs = model(backbone), ids(80)
    t = 32 + place
    changed = inputs.clone()
    changed[:, t + 1] = (changed[:, t + 1] + 8) % 16
    with torch.no_grad():
        before, after = sashimi(inputs), sashimi(changed)
    moved = (after - before).abs().amax(dim=(0, 2)) / before.abs().max()
    assert moved[: t + 1].max() < 1e-10
    assert moved[t + 1] > 1e-3


# --- law 4: any length, nothing rewritten ------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_running_changes_no_weight(recipe: str) -> None:
    """Law 4: the state dict is bit-equal after training-mode and evaluation forwards at several lengths, and steps.

    Mutation: in S4.forward, add `self.C.data.mul_(1 + 1e-6 * u.shape[1])`.
    """
    sashimi = model(recipe, torch.float32)
    before = {name: value.clone() for name, value in sashimi.state_dict().items()}
    for length in (1, 7, 33, 20, 200):
        sashimi.train()(ids(length)).sum().backward()
        with torch.no_grad():
            sashimi.eval()(ids(length))
    with torch.no_grad():
        sashimi.prefill(ids(21), sashimi.init_state(2))
    after = sashimi.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_length(recipe: str) -> None:
    """Law 4: the logits of a prefix are the prefix of the logits, for any L ≥ 1.

    Mutation: in Sashimi.forward, `F.pad(inputs, (0, -length % …))` -> `F.pad(inputs, (-length % …, 0))`.
    """
    sashimi, inputs = model(recipe), ids(150)
    with torch.no_grad():
        whole = sashimi(inputs)
        for length in range(1, 21):
            logits = sashimi(inputs[:, :length])
            assert logits.shape == (2, length, 16)
            assert relative(logits, whole[:, :length]) < 1e-10


def test_weights_fit_any_length() -> None:
    """Law 4: no parameter or buffer depends on a length, so a state dict loads whatever the model has run.

    Mutation: register a buffer of the last length in S4.forward.
    """
    first, second = model(), Sashimi(ModelConfig(**SMALL)).double()
    with torch.no_grad():
        first(ids(300))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first(ids(50)), second(ids(50)))


# --- law 5: precision --------------------------------------------------------------------------------------


def loss_of(logits: Tensor, inputs: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())


def ssm_parameters(sashimi: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}": p
        for prefix, layer in sashimi.named_modules()
        if isinstance(layer, S4)
        for name, p in layer.named_parameters()
    }


def assert_gradients_flow(sashimi: torch.nn.Module, reference: dict[str, Tensor], tolerance: float) -> None:
    """Every parameter has a finite gradient, and near the float32 one."""
    for name, p in sashimi.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
        assert (p.grad - reference[name]).norm() < tolerance * reference[name].norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.2)])
@pytest.mark.parametrize("recipe", ["sashimi", "unet of the original", "diagonal", "cauchy"])
def test_autocast_leaves_the_state_space_alone(recipe: str, dtype: torch.dtype, tolerance: float, scans: str) -> None:
    """Law 5 under autocast: all arithmetic of the S4 layers and every FFT, backward included, in float32; finite
    gradients near the float32 ones for every parameter. Some other layer does run reduced, or nothing was tested.

    Mutation: in S4.forward, `enabled=False` -> `enabled=True`.
    """
    # Of these ids no parameter's gradient is a small difference of large numbers, which rounding alone would change.
    sashimi, inputs = model(recipe, torch.float32), ids(100, seed=12)
    loss_of(sashimi(inputs), inputs).backward()
    reference = {name: p.grad.clone() for name, p in sashimi.named_parameters() if p.grad is not None}
    sashimi.zero_grad()
    with watched(sashimi) as precision:
        with torch.autocast("cpu", dtype):
            logits = sashimi(inputs)
            loss = loss_of(logits, inputs)
        (1024 * loss).backward()
    assert logits.dtype == dtype
    assert precision.faults == []
    each = 2 if scans == "native" else 6  # forward and backward
    assert precision.products >= each * sum(isinstance(layer, S4) for layer in sashimi.modules())
    for p in sashimi.parameters():
        assert p.grad is not None
        p.grad /= 1024
    assert_gradients_flow(sashimi, reference, tolerance)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast_generates(backbone: str) -> None:
    """Law 5 for generation: under autocast, features, prefill and step keep every S4 state float32 and follow forward.

    Mutation: in S4.forward, `state._replace(x=x)` -> `state._replace(x=x.bfloat16())`.
    """
    sashimi, inputs = model(backbone, torch.float32), ids(60)

    def s4_states(value: Any) -> Iterator[S4State]:
        if isinstance(value, S4State):
            yield value
        elif isinstance(value, tuple):
            for item in value:
                yield from s4_states(item)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, scanned = sashimi.prefill(inputs[:, :48], sashimi.init_state(2))
        _, prefilled = sashimi.prefill(inputs[:, 48:50], scanned)
        logits, stepped = sashimi.step(inputs[:, 50], prefilled)
    for state in (scanned, prefilled, stepped):
        layers = list(s4_states(state))
        assert len(layers) == sum(isinstance(layer, S4) for layer in sashimi.modules())
        assert all(layer.x.dtype == layer.recurrence.C.dtype == torch.float32 for layer in layers)
    with torch.no_grad():
        assert relative(logits, sashimi(inputs)[:, 50]) < 0.05


def test_accelerate_leaves_the_state_space_alone(accelerate_anew: None) -> None:
    """Law 5 after Accelerate prepared the model and optimizer for bf16: parameters unrounded, FFTs and S4 layers in
    float32, and a step changes every parameter.

    Mutation: in S4.forward, `enabled=False` -> `enabled=True`.
    """
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    sashimi = model(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in sashimi.named_parameters()}
    prepared, optimizer = accelerator.prepare(sashimi, torch.optim.AdamW(sashimi.parameters(), lr=1e-3))
    for name, p in ssm_parameters(accelerator.unwrap_model(prepared)).items():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name]), name
    inputs = ids(64)
    with watched(sashimi) as precision:
        accelerator.backward(loss_of(prepared(inputs), inputs))
    assert precision.faults == []
    assert precision.products > 0
    optimizer.step()
    for name, p in sashimi.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["sashimi", "unet of the original"])
def test_cast_model_keeps_the_state_space(recipe: str, dtype: torch.dtype) -> None:
    """Law 5 after model.to(bfloat16) or .half(): SSM parameters float32 and unrounded, all else cast; forward,
    backward and generation run.

    Mutation: in S4._apply, `return super()._apply(fn, recurse)`.
    """
    sashimi, inputs = model(recipe, torch.float32), ids(40)
    before = {name: p.detach().clone() for name, p in ssm_parameters(sashimi).items()}
    with torch.no_grad():
        expected = sashimi(inputs)
    sashimi.to(dtype)
    kept = ssm_parameters(sashimi)
    for name, p in sashimi.named_parameters():
        assert p.dtype == (torch.float32 if name in kept else dtype), name
    for name, p in kept.items():
        assert torch.equal(p, before[name]), name
    with watched(sashimi) as precision:
        logits = sashimi(inputs)
        loss_of(logits, inputs).backward()
        with torch.no_grad():
            last, state = sashimi.prefill(inputs[:, :21], sashimi.init_state(2))
            last, state = sashimi.step(inputs[:, 21], state)
    assert precision.faults == []
    assert logits.dtype == last.dtype == dtype
    assert relative(logits, expected) < 0.1
    assert relative(last, expected[:, 21]) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sashimi.parameters())


# --- law 6: stability --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["sashimi", "unet of the original", "diagonal"])
def test_stable_after_wild_training(recipe: str) -> None:
    """Law 6: AdamW at a learning rate of 1 leaves every discrete A within the unit circle (+ 1e-6), and parameters
    far from where they were.

    Mutation: in S4.system, `-torch.exp(self.log_A_real)` -> `-self.log_A_real`.
    """
    sashimi, inputs = model(recipe), ids(64)
    optimizer = torch.optim.AdamW(sashimi.parameters(), lr=1.0)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(sashimi(inputs).double(), inputs).backward()
        optimizer.step()
    layers = [layer for layer in sashimi.modules() if isinstance(layer, S4)]
    assert layers
    for layer in layers:
        assert all(p.isfinite().all() for p in layer.parameters())
        with torch.no_grad():
            assert torch.linalg.matrix_norm(layer.recurrence().dense(), 2).max() <= 1 + 1e-6


# --- size and configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_layers": 2, "glu": False}, 1_289_600),
        ({"n_layers": 4, "glu": False}, 2_217_216),
        ({"n_layers": 6, "glu": False}, 3_144_832),
        ({"n_layers": 8, "glu": False}, 4_072_448),
        ({"n_layers": 2}, 1_462_528),
        ({"n_layers": 4}, 2_563_072),
        ({"n_layers": 6}, 3_663_616),
        ({}, 4_764_160),
        ({"tie_state": False}, 5_447_680),
        ({"tie_state": False, "unet": True}, 6_840_832),
    ],
)
def test_size_is_the_published_one(changes: dict[str, Any], expected: int) -> None:
    """The number of parameters of each published model (a complex one counts twice).

    Mutation: in S4.__init__, `copies = 1 if tie_state else d_model` -> `d_model`; or another default of ModelConfig.
    """
    with torch.device("meta"):
        sashimi = Sashimi(ModelConfig(**changes))
    assert sum(p.numel() for p in sashimi.parameters()) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", 1),
        ("levels", 2**16 + 1),
        ("d_model", 0),
        ("n_layers", 0),
        ("expand", 0),
        ("ff", 0),
        ("pool", (4, 1)),
        ("pool", (0,)),
        ("d_state", 0),
        ("d_state", 7),
        ("norm", "batch"),
        ("mode", "full"),
        ("dt_transform", "log"),
        ("kernel", "fft"),
        ("kernel", "vandermonde"),
        ("dt_min", 0.0),
        ("dt_min", 0.2),
        ("dt_max", 1e-4),
        ("dt_max", math.nan),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", math.nan),
    ],
)
def test_bad_configuration_names_the_field(field: str, value: Any) -> None:
    """Each bad value is refused in one line that names field and value. Mutation: drop any check of __post_init__."""
    with pytest.raises(InputError) as error:
        ModelConfig(**{field: value})
    message = str(error.value)
    assert field in message
    assert str(list(value) if isinstance(value, tuple) else value) in message
    assert "\n" not in message


@pytest.mark.parametrize("kernel", ["krylov", "cauchy", "cauchy_keops"])
def test_diagonal_takes_its_own_kernel(kernel: str) -> None:
    """mode=diag with another kernel names the right one. Mutation: drop the check of mode against kernel."""
    with pytest.raises(InputError, match="use vandermonde"):
        ModelConfig(mode="diag", kernel=kernel)  # type: ignore[arg-type]
