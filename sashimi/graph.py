"""Generation by replaying a period: its steps and draws are recorded once, as one CUDA graph.

The kernels of one sample are many and small, and a GPU waits for Python to launch them. The steps of a pooling period,
a code path for each phase, read and write buffers that stay where they are; so they can be recorded, and launched all
at once for every period that follows. Elsewhere than on CUDA the same steps run as they are written.

Shapes: **B** batch, **L** samples, **P** samples of a period.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sashimi.errors import Unavailable, first_reason
from sashimi.layers import compile_steps
from sashimi.model import Sashimi, SashimiState, map_states

_FEWEST = 16  # samples of a period; it holds several of the pooling's if those are shorter
_MOST = 1024

Steps = Callable[[Tensor, SashimiState, Tensor], tuple[Tensor, Tensor, SashimiState]]
"""ids (B,) of the sample before, state, uniforms (B, L) -> ids (B, L), nats (B, L), state."""


class Graph:
    """An engine: (ids (B,) of the sample before, state, uniforms (B, L)) -> ids (B, L), nats (B, L), state.

    B is `batch_size`, and the parameters are those of its making. `steps` makes the engine whose periods are recorded,
    and which computes what comes before and after whole ones; with `compiled`, layers within periods are compiled
    first. On CUDA without `record`, nothing is. Raises Unavailable for a model or a machine that it cannot do.
    """

    def __init__(
        self,
        model: Sashimi,
        batch_size: int,
        steps: Callable[[Sashimi], Steps],
        *,
        compiled: bool = False,
        record: bool = True,
    ) -> None:
        self.name = "compiled" if compiled else "graph"
        self.total = model.config.total_pool
        length = -(-_FEWEST // self.total) * self.total
        if length > _MOST:
            raise Unavailable(f"its pooling has {self.total} phases, more than {_MOST}")
        device = model.head.weight.device
        with torch.inference_mode(False), torch.no_grad():
            own = _frozen(model)
            self.steps = self.period = steps(own)
            if compiled:
                fused = _frozen(model)
                compile_steps(fused)
                self.period = steps(fused)
            self.tier = own.init_state(batch_size).tier
            self.inputs = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.uniforms = torch.zeros(batch_size, length, dtype=torch.float64, device=device)
            self.ids = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
            self.nats = torch.zeros_like(self.uniforms)
            self.replay = recorded(self.run, device) if record and device.type == "cuda" else self.run
            if compiled:
                _try(self.replay)

    @torch.no_grad()
    def __call__(self, inputs: Tensor, state: SashimiState, uniforms: Tensor) -> tuple[Tensor, Tensor, SashimiState]:
        """See `sampler.Engine`."""
        B, L = uniforms.shape
        P = self.uniforms.shape[1]
        assert len(self.inputs) == B, (B, len(self.inputs))
        ids, nats = torch.empty_like(uniforms, dtype=torch.int64), torch.empty_like(uniforms)
        start = min(-state.phase % self.total, L)
        end = start + (L - start) // P * P

        def step(samples: slice) -> None:
            nonlocal inputs, state
            if samples.start < samples.stop:
                ids[:, samples], nats[:, samples], state = self.steps(inputs, state, uniforms[:, samples])
                inputs = ids[:, samples.stop - 1]

        step(slice(0, start))
        if start < end:
            self.inputs.copy_(inputs)
            map_states(Tensor.copy_, self.tier, state.tier)
            for first in range(start, end, P):
                samples = slice(first, first + P)
                self.uniforms.copy_(uniforms[:, samples])
                self.replay()
                ids[:, samples], nats[:, samples] = self.ids, self.nats
            # The next call overwrites the buffers, but a state may be gone on from more than once.
            inputs = ids[:, end - 1]
            state = SashimiState(map_states(torch.clone, self.tier), 0)
        step(slice(end, L))
        return ids, nats, state

    def run(self) -> None:
        """One period from phase 0, from the buffers to the buffers, in kernels of the device alone."""
        ids, nats, state = self.period(self.inputs, SashimiState(self.tier, 0), self.uniforms)
        self.ids.copy_(ids)
        self.nats.copy_(nats)
        self.inputs.copy_(ids[:, -1])
        map_states(Tensor.copy_, self.tier, state.tier)


def recorded(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`run` as a CUDA graph: what is returned launches at once all that `run` launched, on the same memory.

    `run` is called a few times, must not wait for the device, and owns what it reads and writes for as long as the
    graph is used. Raises Unavailable.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries and kernels are loaded at their first use, which cannot be recorded
                run()
            # Other threads may go on, such as one that pins a training batch's memory.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
    except RuntimeError as error:
        raise Unavailable(f"no CUDA graph could be recorded: {first_reason(error)}") from error
    return graph.replay


def _try(run: Callable[[], None]) -> None:
    """Have everything compiled that `run` needs. Raises Unavailable if it cannot be."""
    try:
        run()
    except RuntimeError as error:
        raise Unavailable(f"its steps cannot be compiled: {first_reason(error)}") from error


def _frozen(model: Sashimi) -> Sashimi:
    """A copy for inference, whose weights stay where they are, those under weight norm too: it is computed once, here.

    `parametrize.cached` would not do: what it computes is gone by the time that a recording is replayed.
    """
    weights = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters()}
    own = copy.deepcopy(model, weights).eval()
    for parent in list(own.modules()):
        for name, child in parent.named_children():
            if parametrize.is_parametrized(child):
                # Not `remove_parametrizations`, which would change a class that the copy shares with its original.
                assert isinstance(child, nn.Linear)
                linear = nn.Linear(child.in_features, child.out_features, device="meta")
                linear.weight, linear.bias = nn.Parameter(child.weight, requires_grad=False), child.bias
                setattr(parent, name, linear)
    return own
