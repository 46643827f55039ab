"""Checkpoints of other code as models of ours: a state dict in; format, ModelConfig and state dict out.

Known: the original code (github.com/state-spaces/s4) in its versions 2 (with "hurwitz" or without) and 4, both
backbones; and a student re-implementation ("seed796"). The architecture is inferred from the tensors alone.

They store C̃ = C (I − A^l) for the length l they last ran at; C is recovered in float64, and l is forgotten.
Shapes: **V** levels, **H** channels, **M** complex modes, **S** copies of shared parameters, **p** pool.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sashimi.errors import InputError
from sashimi.foreign.translation import KNOWN, Imported, Translation, conjugate
from sashimi.model import ModelConfig

_CONTAINERS = ("state_dict", "model_state")  # PyTorch Lightning; the student's
_WRAPPERS = ("model.", "module.", "_orig_mod.")  # PyTorch Lightning, DistributedDataParallel, torch.compile


def import_checkpoint(path: Path, dt_transform: Literal["exp", "softplus"] = "softplus") -> Imported:
    """`read_checkpoint`, then `convert`; every InputError names the file."""
    state = read_checkpoint(path)
    try:
        return convert(state, dt_transform)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, on the CPU. No code in the file is run.

    It is the file's top level, or under "state_dict" or "model_state". InputError if there is none.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a checkpoint written by torch.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: holds {found[1]} objects, which could run code and are not loaded; "
                'if you trust the file, save its "state_dict" alone with torch.save and import that'
            ) from None
        raise InputError(f"{path}: not a checkpoint of torch.save, or damaged ({type(error).__name__})") from None
    for container in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    items = content.items() if isinstance(content, Mapping) else ()
    state = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    for key, value in state.items():
        if value.is_nested or value.is_quantized or value.layout != torch.strided or value.device.type != "cpu":
            raise InputError(
                f"{path}: {key} is a nested, quantized, sparse or empty tensor; import one of plain tensors"
            )
    if not state:
        raise InputError(f'{path}: no tensors at its top level, in "state_dict" or in "model_state"; {KNOWN}')
    while wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def convert(state: Mapping[str, Tensor], dt_transform: Literal["exp", "softplus"] = "softplus") -> Imported:
    """Recognize and translate a state dict.

    `dt_transform` is how a version 4 run mapped `inv_dt` to dt: the one setting that no tensor tells.
    InputError naming the first key that is unknown, missing, damaged, or at odds with the others.
    """
    if "encoder.0.weight" in state:
        return _Original(state).imported(dt_transform)
    if "1.down_pool.linear.weight" in state:
        return _Seed796(state).imported()
    raise InputError(f"unknown format, its first key is {next(iter(state), None)}; {KNOWN}")


# --- the original code -------------------------------------------------------------------------------------


class _Original(Translation):
    """Version 2 and version 4; they differ in the S4 layer only."""

    def imported(self, dt_transform: Literal["exp", "softplus"]) -> Imported:
        """The whole translation."""
        self.v4 = "model.c_layers.0.layer.layer.D" in self.state
        self.inner = "layer.layer." if self.v4 else "layer."
        self.kernel = "layer.layer.kernel." if self.v4 else "layer.kernel.kernel."
        self.free = f"model.c_layers.0.{self.kernel}w" in self.state
        self.bare = self.v4 and not any(key.startswith("model.c_layers.0.layer.output_linear.") for key in self.state)
        self.config = config = self._infer(dt_transform)
        self.tensors["embedding.weight"] = self.read("encoder.0.weight", config.levels, config.d_model)
        for depth in range(len(config.pool) + 1):
            self._tier("tier." + "pooled.tier." * depth, depth)
        self.affine("norm.", "model.norm.", config.d_model)
        self.affine("head.", "decoder.0.output_transform.", config.levels, config.d_model)
        if self.v4:
            self.notes.append(f"no tensor tells whether dt is exp or softplus of inv_dt: {dt_transform} is assumed")
        if self.bare:
            self.notes.append(
                "no Linear follows its S4 layers: ours is the identity there, until it is trained further"
            )
        origin = "state-spaces/s4 version 4" if self.v4 else "state-spaces/s4 version 2"
        origin += ", unet backbone" if config.unet else ""
        if self.free:
            return self.finish("s4-unconstrained", f"{origin}, unconstrained A = diag(w) - P Q*", config)
        return self.finish("sashimi", f"{origin}, stable A = diag(w) - P P*", config)

    def _infer(self, dt_transform: Literal["exp", "softplus"]) -> ModelConfig:
        levels, d_model = self.shape("encoder.0.weight", 2)
        down = [f"model.d_layers.{i}.linear." for i in self.indices("model.d_layers.")]
        down = [key for key in down if f"{key}bias" in self.state]
        weight_norm = any(f"{key}weight_v" in self.state for key in down)
        width, expand, pool = d_model, 2, []
        for key in down:
            weight = f"{key}weight_v" if weight_norm else f"{key}weight"
            expand = self.ratio(weight, 0, width)
            pool.append(self.ratio(weight, 1, width))
            width *= expand
        copies = {self.shape(key, 4)[1] for key in self.state if key.endswith(f"{self.kernel}B")}
        return ModelConfig(
            levels=levels,
            d_model=d_model,
            n_layers=max(len(self.indices("model.c_layers.")) // 2, 1),
            pool=tuple(pool),
            expand=expand,
            ff=self.ratio("model.c_layers.1.layer.ff.0.0.weight", 0, width),
            d_state=2 * self.shape(f"model.c_layers.0.{self.kernel}C", 4)[2],
            glu="model.c_layers.0.layer.output_linear.0.weight" in self.state,
            unet=bool(down) and "model.d_layers.0.linear.bias" not in self.state,
            norm="scalar" if "model.c_layers.0.norm.norm.m" in self.state else "layer",
            weight_norm=weight_norm,
            tie_state=copies == {1},
            dt_transform=dt_transform if self.v4 else "exp",
        )

    def _tier(self, target: str, depth: int) -> None:
        config, depths = self.config, len(self.config.pool)
        width, blocks = config.d_model * config.expand**depth, range(2 * config.n_layers)
        down_layers: list[str] = []
        if depth == depths:
            layers = [f"model.c_layers.{j}." for j in blocks]
        elif config.unet:
            down, up = ((2 * config.n_layers + 1) * i for i in (depth, depths - 1 - depth))
            down_layers = [f"model.d_layers.{down + j}." for j in blocks]
            pools = f"model.d_layers.{down + len(blocks)}.linear.", f"model.u_layers.{up}.linear."
            layers = [f"model.u_layers.{up + 1 + j}." for j in blocks]
        else:
            up = depths - 1 - depth
            pools = f"model.d_layers.{depth}.linear.", f"model.u_layers.{up}.0.linear."
            layers = [f"model.u_layers.{up}.{1 + j}." for j in blocks]
        if depth < depths:
            wide, long = width * config.expand, width * config.pool[depth]
            self._pool(f"{target}pooled.down.linear.", pools[0], wide, long)
            self._pool(f"{target}pooled.up.linear.", pools[1], long, wide)
        for part, keys in (("down", down_layers), ("layers", layers)):
            for j, key in enumerate(keys):
                self._residual(f"{target}{part}.{j}.", key, j % 2 == 0, width)

    def _pool(self, target: str, key: str, d_out: int, d_in: int) -> None:
        if not self.config.weight_norm:
            return self.affine(target, key, d_out, d_in)
        self.tensors[f"{target}parametrizations.weight.original0"] = self.read(f"{key}weight_g", d_out, 1)
        self.tensors[f"{target}parametrizations.weight.original1"] = self.read(f"{key}weight_v", d_out, d_in)
        self.tensors[f"{target}bias"] = self.read(f"{key}bias", d_out)

    def _residual(self, target: str, key: str, is_s4: bool, width: int) -> None:
        if self.config.norm == "scalar":
            self.tensors[f"{target}norm.m"] = self.read(f"{key}norm.norm.m", 1)
            self.tensors[f"{target}norm.s"] = self.read(f"{key}norm.norm.s", 1)
        else:
            self.affine(f"{target}norm.", f"{key}norm.norm.", width)
        if not is_s4:
            self.affine(f"{target}layer.expand.", f"{key}layer.ff.0.0.", self.config.ff * width, width)
            self.affine(f"{target}layer.contract.", f"{key}layer.ff.2.", width, self.config.ff * width)
            return
        self._s4(f"{target}layer.s4", key, width)
        output = f"{key}layer.output_linear."
        if self.config.glu:
            self.affine(f"{target}layer.output.", f"{output}0.", 2 * width, width)
        elif self.bare:
            self.tensors[f"{target}layer.output.weight"] = torch.eye(width, dtype=torch.float64)
            self.tensors[f"{target}layer.output.bias"] = torch.zeros(width, dtype=torch.float64)
        else:
            self.affine(f"{target}layer.output.", output, width, width)

    def _s4(self, target: str, key: str, width: int) -> None:
        kernel, modes = f"{key}{self.kernel}", self.config.d_state // 2
        copies = self.shape(f"{kernel}B", 4)[1]
        if width % copies:
            raise InputError(f"{kernel}B has {copies} copies, which do not divide {width} channels")
        repeats = 1 if self.config.tie_state else width // copies

        def shared(name: str, *shape: int) -> Tensor:
            return self.read(f"{kernel}{name}", copies, *shape).repeat(repeats, *(1 for _ in shape))

        if self.v4:
            A = {"log_A_real": shared("A_real", modes), "A_imag": -shared("A_imag", modes)}
        elif self.free:
            A = {"Lambda": shared("w", modes, 2), "Q": conjugate(shared("Q", modes, 2))}  # their Q is our Q*
        else:
            A = {"log_A_real": shared("log_w_real", modes), "A_imag": shared("w_imag", modes)}
        own = A | {
            "P": shared("P", modes, 2),
            "B": shared("B", modes, 2),
            "C": self.read(f"{kernel}C", width, modes, 2),
            "D": self.read(f"{key}{self.inner}D", width),
            "log_dt": self.read(f"{kernel}{'inv_dt' if self.v4 else 'log_dt'}", width),
        }
        self.tensors |= {f"{target}.{name}": value for name, value in own.items()}
        self.lengths[target] = self._length(kernel)

    def _length(self, kernel: str) -> int:
        if self.v4:
            length = int(self.read(f"{kernel}l_kernel"))
            if length < 0:
                raise InputError(f"{kernel}l_kernel is {length}: must be a length in samples")
            return length
        nodes = self.shape(f"{kernel}omega", 2)[0]  # e^(−2πik/l) for k = 0 … l/2
        self.skip(f"{kernel}omega", f"{kernel}z")
        if nodes == 1:
            return 1
        re, im = self.state[f"{kernel}omega"][1].tolist()
        length = round(math.tau / -math.atan2(im, re)) if im < 0 else 0
        if nodes != length // 2 + 1:
            raise InputError(f"{kernel}omega does not hold the roots of unity of one length")
        return length


# --- the student re-implementation -------------------------------------------------------------------------


class _Seed796(Translation):
    """Nested modules without names: 1 holds the tiers inside, 2 … the layers at the audio rate, the last the head."""

    def imported(self) -> Imported:
        """The whole translation."""
        levels, d_model = self.shape("0.weight", 2)
        width, expand, pool, inside = d_model, 2, [], "1."
        while f"{inside}down_pool.linear.weight" in self.state:
            expand = self.ratio(f"{inside}down_pool.linear.weight", 0, width)
            pool.append(self.ratio(f"{inside}down_pool.linear.weight", 1, width))
            width *= expand
            inside += "sequential.0."
        n_layers = len(self.indices(inside))
        glu = f"{inside}0.0.2.weight" in self.state
        modes = self.shape(f"{inside}0.0.1.Lambda", 2)[0]
        self.config = config = ModelConfig(
            levels=levels,
            d_model=d_model,
            n_layers=n_layers,
            pool=tuple(pool),
            expand=expand,
            ff=self.ratio(f"{inside}0.1.1.weight", 0, 2 * width if glu else width),
            d_state=2 * modes,
            glu=glu,
        )
        self.tensors["embedding.weight"] = self.read("0.weight", levels, d_model)
        for depth in range(len(pool) + 1):
            target, width = "tier." + "pooled.tier." * depth, d_model * expand**depth
            inside = "1." + "sequential.0." * depth
            if depth < len(pool):
                self._pools(f"{target}pooled.", inside, width, pool[depth])
            for j in range(n_layers):
                if depth == len(pool):
                    block = f"{inside}{j}."
                elif depth:
                    block = f"{inside.removesuffix('0.')}{j + 1}."
                else:
                    block = f"{j + 2}."
                self._block(f"{target}layers.", 2 * j, block, width)
        self.affine("head.", f"{n_layers + 2}.", levels, d_model)
        self.notes.append("its code quantizes with torchaudio's mu-law, whose levels differ from ours by at most one")
        return self.finish("seed796", "seed796 re-implementation", config)

    def _pools(self, target: str, inside: str, width: int, pool: int) -> None:
        """Their features are ordered (s, h) with s the position in the pooled step, ours (h, s)."""
        wide, long = width * self.config.expand, width * pool
        self.affine(f"{target}down.linear.", f"{inside}down_pool.linear.", wide, long)
        self.affine(f"{target}up.linear.", f"{inside}up_pool.linear.", long, wide)
        down, up, bias = f"{target}down.linear.weight", f"{target}up.linear.weight", f"{target}up.linear.bias"
        self.tensors[down] = self.tensors[down].unflatten(1, (pool, width)).mT.flatten(1)
        self.tensors[up] = self.tensors[up].unflatten(0, (pool, width)).transpose(0, 1).flatten(0, 1)
        self.tensors[bias] = self.tensors[bias].unflatten(0, (pool, width)).mT.flatten()

    def _block(self, target: str, j: int, block: str, width: int) -> None:
        """An S4 layer and the feed-forward layer after it."""
        glu, modes, hidden = self.config.glu, self.config.d_state // 2, self.config.ff * width
        s4, kernel = f"{target}{j}.layer.s4", f"{block}0.1."
        self.affine(f"{target}{j}.norm.", f"{block}0.0.", width)
        own = {
            "Lambda": self.read(f"{kernel}Lambda", 1, modes, 2),
            "P": self.read(f"{kernel}P", 1, modes, 2),
            "B": self.read(f"{kernel}B", 1, modes, 2),
            "C": conjugate(self.read(f"{kernel}C", width, modes, 2)),  # their C is our C*
            "D": self.read(f"{kernel}D", width),
            "log_dt": self.read(f"{kernel}log_step", 1),
        }
        self.tensors |= {f"{s4}.{name}": value for name, value in own.items()}
        self.lengths[s4] = self.shape(f"{kernel}Omega", 1)[0]
        self.skip(f"{kernel}Omega")
        if glu:
            self.affine(f"{target}{j}.layer.output.", f"{block}0.2.", 2 * width, width)
        else:
            self.affine(f"{target}{j}.layer.output.", f"{block}0.3.", width, width)
        self.affine(f"{target}{j + 1}.norm.", f"{block}1.0.", width)
        self.affine(f"{target}{j + 1}.layer.expand.", f"{block}1.1.", 2 * hidden if glu else hidden, width)
        self.affine(f"{target}{j + 1}.layer.contract.", f"{block}1.3.", width, hidden)
