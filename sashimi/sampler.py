"""New audio from a model: ids from logits and uniforms, clips from ids.

Every sample of every clip is drawn from a uniform that is a function of (seed, clip, sample), and clip i is always
computed in row i mod B of batch i // B, beside the same neighbours. So for one engine, device and batch size B a clip
has the same bits whoever computes it, in whatever order, in one go or after an interruption.

Shapes: **B** batch, **L** samples, **V** levels.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from sashimi.errors import InputError, Unavailable
from sashimi.graph import Graph
from sashimi.model import Sashimi, SashimiState
from sashimi.native.engine import Native

_BLOCK = 512  # samples an engine is asked for at a time, about
_UNIT = 1 << 52  # probability 1 as an integer
LEAST_TEMPERATURE, LEAST_TOP_P = 1e-6, 1e-9  # far less is a denormal number, or makes one, and so is nothing

EngineName = Literal["auto", "graph", "compiled", "native", "plain"]

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""logits (B, V), uniforms (B,) -> ids (B,), nats (B,)."""


class Engine(Protocol):
    """Computes samples of a model, as it was when the engine was made; a pure function. Its name goes into files."""

    name: str

    def __call__(self, inputs: Tensor, state: SashimiState, uniforms: Tensor) -> tuple[Tensor, Tensor, SashimiState]:
        """ids (B,) of the sample before, state, uniforms (B, L) -> ids (B, L), nats (B, L), state."""


# --- one sample ------------------------------------------------------------------------------------------------


def uniforms(seed: int, clip: int, n_samples: int, start: int = 0) -> np.ndarray:
    """The uniforms in [0, 1) of a clip's samples start, start + 1, …: (n_samples,) float64.

    Counter-based (Philox, keyed by seed and clip): any part costs the same to make.
    """
    counter, skip = divmod(start, 4)  # a counter value yields four numbers
    philox = np.random.Philox(key=np.array([seed, clip], dtype=np.uint64), counter=counter)
    return (philox.random_raw(skip + n_samples)[skip:] >> np.uint64(11)) * 2.0**-53


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one id a row by inverse CDF: logits (B, V), uniforms (B,) float64 -> ids (B,) int64, nats (B,) float64.

    Logits are divided by `temperature`; then only the `top_k` likeliest ids remain (the lower of equally likely ones),
    and of these the fewest that hold the share `top_p` of their probability. Nats are −log p of the id under the model
    itself, without any of the three.
    """
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp() if temperature == 1 else (log_probs / temperature).softmax(-1)
    if top_k is not None or top_p < 1:
        probs = _truncate(probs, top_k, top_p)
    # Integers add up alike in any order; a GPU's parallel sum of floats may not, nor need it be monotone.
    cdf = (probs * _UNIT).long().cumsum(-1)
    place = (uniforms * cdf[:, -1]).long()
    ids = torch.searchsorted(cdf, place.unsqueeze(-1), right=True).clamp(max=logits.shape[-1] - 1)
    return ids.squeeze(-1), -log_probs.gather(-1, ids).squeeze(-1)


def _truncate(probs: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Zero all but the `top_k` likeliest, and of these all but the fewest with the share `top_p`. (B, V) -> (B, V)."""
    likeliest, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        likeliest[:, top_k:].zero_()
    if top_p < 1:
        before = likeliest.cumsum(-1) - likeliest
        likeliest = likeliest.masked_fill(before >= top_p * likeliest.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter(-1, order, likeliest)


class Plain:
    """One `model.step` a sample, in eager mode: the reference of every other engine."""

    name = "plain"

    def __init__(self, model: Sashimi, choose: Choose) -> None:
        self.model, self.choose = model, choose

    def __call__(self, inputs: Tensor, state: SashimiState, uniforms: Tensor) -> tuple[Tensor, Tensor, SashimiState]:
        """See `Engine`."""
        ids, nats = [], []
        for u in uniforms.unbind(-1):
            logits, state = self.model.step(inputs, state)
            inputs, cost = self.choose(logits, u)
            ids.append(inputs)
            nats.append(cost)
        return torch.stack(ids, dim=-1), torch.stack(nats, dim=-1), state


# --- clips -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn; with model, prompt, engine and device it decides every bit of every clip."""

    seed: int = 0
    """Seed of the draws; clip i of another seed is another clip."""
    temperature: float = 1.0
    """Divides the logits: below 1 likelier and duller, above 1 noisier."""
    top_k: int | None = None
    """Draw from this many likeliest levels only; by default from all."""
    top_p: float = 1.0
    """Draw from the fewest levels that hold this share of the probability."""
    batch_size: int = 16
    """Clips computed together; ranks divide whole batches between them."""
    engine: EngineName = "auto"
    """graph: one CUDA graph a pooling period; on a CPU, the same steps one by one. compiled: the same of layers that
    torch.compile has fused, half a minute at the beginning and then twice as fast on a GPU. native: compiled code, on
    CPUs with a C++ compiler. plain: the model's own step. auto: graph on CUDA, native on CPUs, and plain where they
    cannot be."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed={self.seed}: must be from 0 to 2^64 - 1")
        if not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise InputError(
                f"temperature={self.temperature}: must be at least {LEAST_TEMPERATURE}, and finite; "
                "top_k=1 always takes the likeliest level"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: must be at least 1; leave it out to draw from all levels")
        if not LEAST_TOP_P <= self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must be {LEAST_TOP_P} to 1, which draws from all levels")
        if not 1 <= self.batch_size <= 1 << 20:
            raise InputError(f"batch_size={self.batch_size}: must be 1 to {1 << 20}")
        if self.engine not in get_args(EngineName):
            raise InputError(f"engine={self.engine}: choose one of {', '.join(get_args(EngineName))}")

    def choose(self, levels: int) -> Choose:
        """`draw` with these settings, for a model of so many levels."""
        if self.top_k is not None and self.top_k > levels:
            raise InputError(f"top_k={self.top_k}: the model has {levels} levels; give at most that, or leave it out")
        return partial(draw, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def make_engine(model: Sashimi, drawing: Drawing) -> Engine:
    """The engine that `drawing` asks for. InputError if it cannot be had, or a setting does not fit the model."""
    plain = partial(Plain, choose=drawing.choose(model.config.levels))
    name, device = drawing.engine, model.head.weight.device.type
    if name == "auto":
        name = "graph" if device == "cuda" else "native" if device == "cpu" else "plain"
    try:
        if name in ("graph", "compiled"):
            return Graph(model, drawing.batch_size, plain, compiled=name == "compiled")
        if name == "native":
            return Native(model, drawing.batch_size, drawing.temperature, drawing.top_k or 0, drawing.top_p)
    except Unavailable as reason:
        if drawing.engine == name:
            raise InputError(f"engine={name}: {reason}; leave it to auto, or take plain") from reason
        warnings.warn(f"clips are made by the plain engine, the {name} one is not to be had: {reason}", stacklevel=2)
    return plain(model)


def generate(
    model: Sashimi,
    n_samples: int,
    clips: Iterable[int] = (0,),
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    prompt: Tensor | None = None,
    batch_size: int | None = None,
    engine: EngineName = "auto",
    on_progress: Callable[[int], None] = lambda samples: None,
) -> Tensor:
    """New samples of the clips of these numbers: ids (number of clips, n_samples) int64, on the CPU.

        model = sashimi.load_model("runs/demo")
        ids = sashimi.generate(model, n_samples=64000, clips=range(4), seed=0)
        config = sashimi.read_audio_config("runs/demo")
        sashimi.write_wav("clip.wav", sashimi.Quantizer(config).decode(ids[0]), config.sample_rate)

    Args:
        seed, temperature, top_k, top_p, engine: see `Drawing`.
        prompt: ids (P,) that every clip goes on from; they are not part of the result.
        batch_size: clips computed together, by default as many as are asked for. Batches begin at multiples of it and
            are always whole, or a clip's bits would depend on what else is asked for.
        on_progress: told the number of samples that each clip of the batch in work has just grown by.

    Raises InputError for values out of range, and if the model's output is not finite.
    """
    numbers = list(clips)
    if not numbers or min(numbers) < 0:
        raise InputError(f"clips={numbers}: give at least one clip number, each 0 or more")
    if n_samples < 1:
        raise InputError(f"n_samples={n_samples}: must be at least 1")
    drawing = Drawing(seed, temperature, top_k, top_p, len(numbers) if batch_size is None else batch_size, engine)
    generator = Generator(model, drawing, make_engine(model, drawing), prompt)
    rows = {}
    for batch, wanted in batches_of(numbers, drawing.batch_size):
        ids, _ = generator.batch(batch, n_samples, on_progress)
        rows.update({clip: ids[clip % drawing.batch_size] for clip in wanted})
    return torch.stack([rows[clip] for clip in numbers])


def batches_of(clips: Iterable[int], batch_size: int) -> list[tuple[int, list[int]]]:
    """The batches that these clips are in, in order, each with those of the clips that it holds."""
    batches: dict[int, list[int]] = {}
    for clip in sorted(set(clips)):
        batches.setdefault(clip // batch_size, []).append(clip)
    return list(batches.items())


class Generator:
    """Computes batches of clips that share a model, a drawing and a prompt."""

    def __init__(self, model: Sashimi, drawing: Drawing, engine: Engine, prompt: Tensor | None = None) -> None:
        """prompt: ids (P,) that every clip goes on from, taken in here, once; none or P = 0 starts from silence."""
        levels, size = model.config.levels, drawing.batch_size
        heard = torch.tensor([levels // 2])  # silence is what precedes a recording
        if prompt is not None and len(prompt):
            if prompt.dim() != 1 or prompt.is_floating_point() or prompt.min() < 0 or prompt.max() >= levels:
                raise InputError(f"prompt: must be ids (P,) from 0 to {levels - 1}; a Quantizer makes them from audio")
            heard = torch.cat((heard, prompt.cpu()))
        self.model, self.drawing, self.engine = model, drawing, engine
        self.device = next(model.parameters()).device
        with _inference(model):
            rows = heard.to(self.device).expand(size, -1)
            state = model.init_state(size)
            if len(heard) > 1:
                _, state = model.prefill(rows[:, :-1], state)
        self.start = rows[:, -1], state

    def batch(
        self, batch: int, n_samples: int, on_progress: Callable[[int], None] = lambda samples: None
    ) -> tuple[Tensor, Tensor]:
        """Clips batch·B … batch·B + B − 1: ids (B, n_samples) int64 and nats (B, n_samples) float64, on the CPU.

        `on_progress` is told the number of samples that every row has just grown by.
        """
        size, seed = self.drawing.batch_size, self.drawing.seed
        first = batch * size
        ids = torch.empty(size, n_samples, dtype=torch.int64)
        nats = torch.empty(size, n_samples, dtype=torch.float64)
        inputs, state = self.start
        period = self.model.config.total_pool
        whole = max(1, _BLOCK // period) * period
        with _inference(self.model):
            # Blocks end where pooling periods do, whatever the prompt's length: engines may be fast at whole ones.
            for start in range(-state.phase, n_samples, whole):
                block = slice(max(start, 0), min(start + whole, n_samples))
                length = block.stop - block.start
                u = np.stack([uniforms(seed, first + i, length, block.start) for i in range(size)])
                new, cost, state = self.engine(inputs, state, torch.from_numpy(u).to(self.device))
                inputs, ids[:, block], nats[:, block] = new[:, -1], new, cost
                if not nats[:, block].isfinite().all():
                    raise InputError(
                        f"clips {first} to {first + size - 1}: the model's output is not finite before sample "
                        f"{block.stop}, so its weights are damaged or have diverged; sample an earlier checkpoint"
                    )
                on_progress(length)
        return ids, nats


@contextmanager
def _inference(model: Sashimi) -> Iterator[None]:
    """Within: evaluation mode, no autograd, weight norm computed once, one CPU thread, and no denormal numbers.

    The matrices of one sample are too small for threads to share, which only slows them down, and another number of
    threads may round differently. More processes put more cores to use. Denormals are flushed as `Distributed` has it,
    or a clip's bits could depend on who asks for it.
    """
    training, threads = model.training, torch.get_num_threads()
    flushed = not (torch.tensor(1e-38, dtype=torch.float32, device="cpu") * 0.1).item()
    model.eval()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        with torch.inference_mode(), parametrize.cached():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)
        model.train(training)
