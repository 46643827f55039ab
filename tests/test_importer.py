"""Imported checkpoints: equal to the code they come from, refused in one line where they do not fit.

tests/reference/ holds random models run by that code: checkpoint, config.json, and io.npz with input ids (already
shifted) and the logits at some positions. The configs are read here only; the importer sees tensors alone.
"""

import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command
from torch import Tensor, nn

from sashimi.errors import InputError
from sashimi.foreign import legacy
from sashimi.foreign.importer import convert, import_checkpoint, read_checkpoint
from sashimi.model import ModelConfig, Sashimi, Tier
from sashimi.model_folder import load_model
from sashimi.s4 import S4

REFERENCE = Path(__file__).parent / "reference"
FOLDERS = sorted(path.parent.name for path in REFERENCE.glob("*/config.json"))
V4 = REFERENCE / "s4_v4_sc09" / "checkpoint.pt"
STUDENT = REFERENCE / "seed796_glu" / "epoch0001.pt"
FORMATS = {
    "s4_v2_sc09_release": "s4-unconstrained",
    "s4_v2_youtubemix_release": "s4-unconstrained",
    "seed796_gelu": "seed796",
    "seed796_glu": "seed796",
}


def checkpoint_of(name: str) -> Path:
    return next((REFERENCE / name).glob("*.pt"))


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    command("tools/import_checkpoint.py", [str(argument) for argument in arguments], monkeypatch)


def step_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, L) -> (B, L, V), one sample at a time."""
    state, logits = model.init_state(len(tokens)), []
    for sample in tokens.unbind(1):
        y, state = model.step(sample, state)
        logits.append(y)
    return torch.stack(logits, dim=1)


# --- equal to the reference --------------------------------------------------------------------------------


def test_all_references_are_here() -> None:
    assert len(FOLDERS) == 8


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_logits_equal_the_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the tool and load_model, by convolution, recurrence and prefill, within 1e-4 (float32 and float64).

    Mutations: return s4.C at once in `_untruncated` (C̃ taken for C); read Q, or seed796's C, without `conjugate`;
    drop the minus of A_imag; drop any transposition of `_pools`; in legacy, UpPool for ShiftedFirst, S4Block for
    UngatedFirst, or no change of `outer_skip`.
    """
    run_tool(monkeypatch, checkpoint_of(name), "--out", tmp_path / "model")
    assert "found: " in capsys.readouterr().out
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["format"] == FORMATS.get(name, "sashimi")
    io = np.load(REFERENCE / name / "io.npz")
    tokens, positions = torch.from_numpy(io["tokens"]).long(), torch.from_numpy(io["positions"])
    expected = torch.from_numpy(io["logits"])
    model = load_model(tmp_path / "model")
    assert not model.training
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        assert (model(tokens)[:, positions] - expected).abs().max() < 1e-4
        assert (step_logits(model, tokens)[:, positions] - expected).abs().max() < 1e-4
        last, _ = model.prefill(tokens[:, : positions[-1] + 1], model.init_state(len(tokens)))
        assert (last - expected[:, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("s4")])
def test_architecture_is_inferred(name: str) -> None:
    """What the original's config says, from the tensors alone."""
    theirs = json.loads((REFERENCE / name / "config.json").read_text())
    layer = theirs["layer"]
    imported = import_checkpoint(checkpoint_of(name))
    ours = imported.config
    assert (ours.d_model, ours.n_layers, list(ours.pool)) == (theirs["d_model"], theirs["n_layers"], theirs["pool"])
    assert (ours.expand, ours.ff, ours.d_state) == (theirs["expand"], theirs["ff"], layer["d_state"])
    assert ours.glu == ("glu" in (layer["postact"], layer.get("final_act")))
    assert ours.unet == (theirs["backbone"] == "unet")
    assert ours.tie_state == (layer.get("tie_state", False) or layer.get("n_ssm") == 1)
    assert ours.dt_transform == layer.get("dt_transform", "exp")
    assert (imported.format == "s4-unconstrained") == (not layer.get("hurwitz", True))
    identity = sum(p.numel() for key, p in imported.tensors.items() if key.endswith(("output.weight", "output.bias")))
    added = identity if layer.get("final_act", "") is None else 0
    assert sum(p.numel() for p in imported.tensors.values()) == theirs["parameters_counted_as_reals"] + added


# --- other sizes: our models written in the other code's way, and read again -------------------------------


def tiers(model: Sashimi) -> Iterator[Tier]:
    tier: Tier | None = model.tier
    while tier is not None:
        yield tier
        tier = tier.pooled and tier.pooled.tier


def truncated(s4: S4, length: int) -> Tensor:
    """C̃ = C (I − A^length) by the definition, C itself for length 0: (H, M, 2)."""
    if length == 0:
        return s4.C
    A = s4.recurrence().dense()
    rest = row = torch.cat((s4.C[..., 0], -s4.C[..., 1]), dim=-1).unsqueeze(-2)
    for _ in range(length):
        rest = rest @ A
    re, im = (row - rest).squeeze(-2).chunk(2, dim=-1)
    return torch.stack((re, -im), dim=-1)


def affine(key: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"{key}.weight": layer.weight, f"{key}.bias": layer.bias}


def written_as_version_4(model: Sashimi, copies: int, length: int) -> dict[str, Tensor]:
    """The state dict that the original's version 4 would have; the first `copies` of shared parameters are stored."""
    n, depths = 2 * model.config.n_layers, len(model.config.pool)
    state = affine("model.norm", model.norm) | affine("decoder.0.output_transform", model.head)
    state["encoder.0.weight"] = model.embedding.weight

    def block(key: str, residual: nn.Module) -> None:
        norm, layer = residual.norm, residual.layer
        state.update({f"{key}.norm.norm.{name}": value for name, value in norm.named_parameters()})
        if hasattr(layer, "contract"):
            state.update(affine(f"{key}.layer.ff.0.0", layer.expand) | affine(f"{key}.layer.ff.2", layer.contract))
            return
        s4, kernel = layer.s4, f"{key}.layer.layer.kernel."
        state.update(affine(f"{key}.layer.output_linear{'.0' if layer.glu else ''}", layer.output))
        state[f"{key}.layer.layer.D"] = s4.D[None]
        state[f"{kernel}inv_dt"] = s4.log_dt[:, None]
        state[f"{kernel}A_real"], state[f"{kernel}A_imag"] = s4.log_A_real[:copies], -s4.A_imag[:copies]
        state[f"{kernel}P"], state[f"{kernel}B"] = s4.P[None, :copies], s4.B[None, :copies]
        state[f"{kernel}C"], state[f"{kernel}l_kernel"] = truncated(s4, length)[None], torch.tensor(length)

    def pool(key: str, linear: nn.Module) -> None:
        state[f"{key}.linear.bias"] = linear.bias
        if model.config.weight_norm:
            weight = linear.parametrizations.weight
            state[f"{key}.linear.weight_g"], state[f"{key}.linear.weight_v"] = weight.original0, weight.original1
        else:
            state[f"{key}.linear.weight"] = linear.weight

    for depth, tier in enumerate(tiers(model)):
        up = depths - 1 - depth
        if tier.pooled is None:
            above = "model.c_layers.{}"
        elif model.config.unet:
            pool(f"model.d_layers.{(n + 1) * depth + n}", tier.pooled.down.linear)
            pool(f"model.u_layers.{(n + 1) * up}", tier.pooled.up.linear)
            above = ""
        else:
            pool(f"model.d_layers.{depth}", tier.pooled.down.linear)
            pool(f"model.u_layers.{up}.0", tier.pooled.up.linear)
            above = f"model.u_layers.{up}." + "{}"
        first = 0 if tier.pooled is None else 1
        for j, layer in enumerate(tier.down):
            block(f"model.d_layers.{(n + 1) * depth + j}", layer)
        for j, layer in enumerate(tier.layers):
            block(above.format(first + j) if above else f"model.u_layers.{(n + 1) * up + 1 + j}", layer)
    return {key: value.detach().clone() for key, value in state.items()}


def written_as_seed796(model: legacy.InferenceOnly, length: int) -> dict[str, Tensor]:
    """The state dict that the student re-implementation would have."""
    n, depths = model.config.n_layers, len(model.config.pool)
    state = affine(f"{n + 2}", model.head) | {"0.weight": model.embedding.weight}
    for depth, tier in enumerate(tiers(model)):
        inside = "1." + "sequential.0." * depth
        if tier.pooled is not None:
            H, p = tier.pooled.d_model, tier.pooled.pool
            down, up = tier.pooled.down.linear, tier.pooled.up.linear
            state[f"{inside}down_pool.linear.weight"] = down.weight.reshape(-1, H, p).transpose(1, 2).reshape(-1, p * H)
            state[f"{inside}down_pool.linear.bias"] = down.bias
            state[f"{inside}up_pool.linear.weight"] = up.weight.reshape(H, p, -1).transpose(0, 1).reshape(p * H, -1)
            state[f"{inside}up_pool.linear.bias"] = up.bias.reshape(H, p).T.reshape(-1)
        for j in range(n):
            place = f"{inside}{j}." if depth == depths else f"1.{'sequential.0.' * (depth - 1)}sequential.{j + 1}."
            place = place if depth else f"{j + 2}."
            mixing, feeding = tier.layers[2 * j], tier.layers[2 * j + 1]
            s4, kernel = mixing.layer.s4, f"{place}0.1."
            state |= affine(f"{place}0.0", mixing.norm) | affine(f"{place}1.0", feeding.norm)
            state |= affine(f"{place}0.{2 if model.config.glu else 3}", mixing.layer.output)
            state |= affine(f"{place}1.1", feeding.layer.expand) | affine(f"{place}1.3", feeding.layer.contract)
            state[f"{kernel}Lambda"], state[f"{kernel}P"], state[f"{kernel}B"] = s4.Lambda[0], s4.P[0], s4.B[0][:, None]
            state[f"{kernel}C"] = truncated(s4, length) * torch.tensor([1, -1])
            state[f"{kernel}D"], state[f"{kernel}log_step"] = s4.D, s4.log_dt
            state[f"{kernel}Omega"] = torch.polar(torch.ones(length), -math.tau * torch.arange(length) / length)
    return {key: value.detach().clone() for key, value in state.items()}


def randomized(model: nn.Module, copies: int = 1) -> nn.Module:
    """Every parameter moved off its initial value, in float64, the same on all machines."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.double().parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for s4 in (module for module in model.modules() if isinstance(module, S4)):
        for name in ("log_A_real", "A_imag", "P", "B"):
            if len(value := getattr(s4, name, torch.zeros(1))) > copies:
                value.data = value.data[:copies].repeat(len(value) // copies, *[1] * (value.dim() - 1))
    return model


OTHER_SIZES = {
    "three tiers, one layer": (ModelConfig(17, 6, 1, (2, 3), 3, 1, 10, dt_transform="softplus"), 1, 24),
    "one pool, untied": (ModelConfig(300, 4, 3, (5,), 1, 3, 4, tie_state=False, dt_transform="softplus"), 4, 5),
    "no pool, two copies": (
        ModelConfig(16, 4, 1, (), 2, 2, 6, glu=False, tie_state=False, dt_transform="softplus"),
        2,
        0,
    ),
    "unet": (ModelConfig(16, 4, 1, (2, 2, 2), 2, 2, 6, unet=True, norm="scalar", dt_transform="exp"), 1, 7),
    "weight norm": (ModelConfig(16, 4, 2, (2,), 2, 2, 6, norm="scalar", weight_norm=True, dt_transform="exp"), 1, 1),
}


@pytest.mark.parametrize("case", OTHER_SIZES)
@torch.no_grad()
def test_original_of_other_sizes(case: str) -> None:
    """Mutations: `expand=2` in `_infer`; `repeats = 1` in `_s4`."""
    config, copies, length = OTHER_SIZES[case]
    model = randomized(Sashimi(config), copies).eval()
    state = written_as_version_4(model, copies, length)
    imported = convert(state, config.dt_transform)
    assert imported.config == config
    tokens = torch.arange(2 * 50).reshape(2, 50) * 7 % config.levels
    again = Sashimi(imported.config).eval()
    again.load_state_dict(imported.tensors)
    torch.testing.assert_close(again(tokens), model(tokens).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("pool", [(4, 4), (3,), (2, 3, 2)])
@torch.no_grad()
def test_seed796_of_other_sizes(pool: tuple[int, ...], glu: bool) -> None:
    """Mutation: in `_Seed796.imported`, `inside.removesuffix("0.")` -> `inside`."""
    config = ModelConfig(12, 6, 3, pool, 3, 2, 8, glu=glu)
    model = randomized(legacy.build("seed796", config))
    imported = convert(written_as_seed796(model, length=13))
    assert imported.config == config
    tokens = torch.arange(2 * 50).reshape(2, 50) * 7 % config.levels
    again = legacy.build("seed796", imported.config)
    again.load_state_dict(imported.tensors)
    torch.testing.assert_close(again(tokens), model(tokens).float(), atol=1e-4, rtol=1e-4)


# --- the models of legacy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FORMATS))
@torch.no_grad()
def test_legacy_forward_equals_step(name: str) -> None:
    """Law 2 for the imported classes. Mutation: in UnpairedRecurrence.step, + for - before `a_im * s_re`."""
    imported = import_checkpoint(checkpoint_of(name))
    model = legacy.build(imported.format, imported.config).double()
    model.load_state_dict(imported.tensors)
    tokens = torch.arange(3 * 70).reshape(3, 70) * 11 % 256
    full = model(tokens)
    torch.testing.assert_close(step_logits(model, tokens), full, atol=1e-9, rtol=1e-9)
    last, _ = model.prefill(tokens, model.init_state(3))
    torch.testing.assert_close(last, full[:, -1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_legacy_is_inference_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 6: imported unconstrained models refuse training and say so. Mutation: drop `_refuse` in `train`."""
    run_tool(monkeypatch, checkpoint_of(name), "--out", tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.inference_only
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for forbidden in (model.train, model.requires_grad_, nn.Sequential(model).train):
        with pytest.raises(InputError, match=f"{FORMATS[name]}.*inference-only"):
            forbidden()
    assert model.eval() is model


def test_unknown_format_and_kernel() -> None:
    with pytest.raises(InputError, match="'s5'"):
        legacy.build("s5", ModelConfig())
    with pytest.raises(InputError, match="kernel=cauchy"):
        legacy.build("seed796", ModelConfig(kernel="cauchy"))


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in FORMATS])
def test_stable_imports_can_be_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are models like any other: every parameter gets a gradient, and a few steps reduce the loss."""
    run_tool(monkeypatch, checkpoint_of(name), "--out", tmp_path / "model")
    model = load_model(tmp_path / "model").train()
    ids = torch.from_numpy(np.load(REFERENCE / name / "io.npz")["tokens"])[:, :129].long()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.003), []
    for _ in range(4):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < losses[0]


# --- the tool and what it refuses --------------------------------------------------------------------------


def test_tool_records_audio_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is told goes into config.json; what is not gets the default of the recognized code."""
    run_tool(monkeypatch, V4, "--out", tmp_path / "a", "--sample-rate", "8000", "--quantizer", "linear")
    run_tool(monkeypatch, STUDENT, "--out", tmp_path / "b")
    told, assumed = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert told["audio"] == {"sample_rate": 8000, "quantizer": "linear", "bits": 8}
    assert assumed["audio"] == {"sample_rate": 16000, "quantizer": "mu-law", "bits": 8}
    assert told["source"]["file"] == "checkpoint.pt"
    assert len(told["source"]["sha256"]) == 64
    output = capsys.readouterr().out
    assert "version 4" in output
    assert "seed796" in output


def test_wrappers_are_seen_through(tmp_path: Path) -> None:
    """The same tensors at the top level, under "state_dict", and with the prefixes that wrappers add."""
    state = torch.load(V4, weights_only=True)
    wrapped = {f"module.model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3, "global_step": 17}, tmp_path / "lightning.ckpt")
    plain, seen_through = (import_checkpoint(path) for path in (V4, tmp_path / "lightning.ckpt"))
    assert plain.config == seen_through.config
    assert all(torch.equal(value, seen_through.tensors[key]) for key, value in plain.tensors.items())


def test_conversion_is_pure() -> None:
    """Neither the checkpoint nor the random numbers of the caller change. Mutation: drop `fork_rng`."""
    state = read_checkpoint(V4)
    copies = {key: value.clone() for key, value in state.items()}
    before = torch.get_rng_state()
    first, second = convert(state), convert(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, copies[key]) for key, value in state.items())
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())


def test_dt_transform_can_be_told() -> None:
    softplus, exp = (import_checkpoint(V4, transform) for transform in ("softplus", "exp"))
    assert (softplus.config.dt_transform, exp.config.dt_transform) == ("softplus", "exp")
    assert not torch.allclose(softplus.tensors["tier.layers.0.layer.s4.C"], exp.tensors["tier.layers.0.layer.s4.C"])


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Mutation: weights_only=False."""
    target = tmp_path / "made"
    torch.save({"state_dict": torch.load(V4, weights_only=True), "hyper_parameters": Bomb(target)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(target), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=r"holds posix\.mkdir objects, which could run code"):
            read_checkpoint(tmp_path / name)
    assert not target.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    """One line each, with the file's name."""
    whole = V4.read_bytes()
    files = {
        "empty.pt": b"",
        "text.pt": b"not a checkpoint\n" * 100,
        "half.pt": whole[: len(whole) // 2],
        "no-end.pt": whole[:-10],
        "damaged.pt": whole[:2000] + b"\xff" * 500 + whole[2500:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "no-tensors.pt")
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.pt", tmp_path]:
        with pytest.raises(InputError, match=path.name) as error:
            import_checkpoint(path)
        assert "\n" not in str(error.value)


C0 = "model.c_layers.0.layer.layer.kernel."


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.norm.bias", None, r"model\.norm\.bias is missing \(beside weight\)"),
        ("encoder.0.weight", None, "unknown format, its first key is model.d_layers"),
        (f"{C0}P", None, r"kernel\.P is missing \(beside inv_dt, C, B, A_real, A_imag, l_kernel\)"),
        ("model.interp_layers.0.weight", torch.ones(3), "1 unknown keys, first model.interp_layers.0.weight"),
        ("model.c_layers.0.layer.layer.D", torch.ones(1, 31), r"layer\.D is \[1, 31\] .*expected real \[32\]"),
        ("model.d_layers.1.linear.weight_v", torch.ones(32, 63), r"weight_v is \[32, 63\]: 63 is no multiple of 16"),
        (f"{C0}P", torch.ones(2, 1, 32, 2), r"P is \[2, 1, 32, 2\] .*expected real \[1, 32, 2\]"),
        (f"{C0}B", torch.ones(1, 3, 32, 2), "B has 3 copies, which do not divide 32 channels"),
        (f"{C0}C", torch.full((1, 32, 32, 2), torch.nan), "C holds NaN or infinity"),
        (f"{C0}A_real", torch.full((1, 32), 200.0), "so that C cannot be recovered"),
        ("encoder.0.weight", torch.ones(256), r"encoder\.0\.weight is \[256\], expected 2 dimensions"),
    ],
)
def test_tensors_that_do_not_fit(key: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    """The first key at odds with the rest is named, with the file, in one line.

    Mutations: drop the check of `unread` in `finish`; the comparison of shapes, or of finiteness, in `read`.
    """
    state = torch.load(V4, weights_only=True)
    if value is None:
        del state[key]
    else:
        state[key] = value
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=message) as error:
        import_checkpoint(tmp_path / "odd.pt")
    assert str(error.value).startswith(str(tmp_path / "odd.pt"))
    assert "\n" not in str(error.value)
