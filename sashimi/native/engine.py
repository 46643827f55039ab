"""The engine: states in, compiled code, states out.

Shapes: **B** batch, **L** samples, **W** numbers in a vector.
"""

import ctypes

import numpy as np
import torch
from torch import Tensor

from sashimi.errors import Unavailable
from sashimi.model import Sashimi, SashimiState, map_states
from sashimi.native.activations import tables
from sashimi.native.library import library
from sashimi.native.program import Program

_MOST_PHASES = 4096  # each has its own program
_MANY = 4  # batches from this size on fill the lanes of a vector with clips, below it with features


class Drawing(ctypes.Structure):
    _fields_ = (("temperature", ctypes.c_double), ("top_k", ctypes.c_int64), ("top_p", ctypes.c_double))


class Native:
    """An engine: (ids (B,) of the sample before, state, uniforms (B, L)) -> ids (B, L), nats (B, L), state.

    B is `batch_size`, and the parameters are those of its making. Temperature, top_k (0: all) and top_p are as in
    `sampler.draw`. Raises Unavailable for a model or a machine that it cannot do.
    """

    name = "native"

    def __init__(self, model: Sashimi, batch_size: int, temperature: float, top_k: int, top_p: float) -> None:
        weight = model.head.weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
            raise Unavailable(f"it runs float32 and float64 on CPUs, not {weight.dtype} on {weight.device}")
        self.model, self.library = model, library("generate")
        if model.config.total_pool > _MOST_PHASES:
            raise Unavailable(f"it has {model.config.total_pool} phases, more than {_MOST_PHASES}")
        self.drawing = Drawing(temperature, top_k, top_p)
        self.tables = tables()
        self.program = Program(model, single=batch_size < _MANY)

    def __call__(self, inputs: Tensor, state: SashimiState, uniforms: Tensor) -> tuple[Tensor, Tensor, SashimiState]:
        B, L = uniforms.shape
        program = self.program
        lanes = 1 if program.single else program.width
        ids, nats = torch.empty(B, L, dtype=torch.int64), torch.empty(B, L, dtype=torch.float64)
        tiers = []
        for first in range(0, B, lanes):
            rows = slice(first, min(first + lanes, B))
            before = map_states(lambda t, rows=rows: t[rows], state.tier)
            memory = program.memory()
            program.load(memory, self.model.tier, before)
            self._run(memory, state.phase, inputs[rows], uniforms[rows], ids[rows], nats[rows])
            tiers.append(program.store(memory, self.model.tier, before))
        phase = (state.phase + L) % self.model.config.total_pool
        return ids, nats, SashimiState(map_states(lambda *parts: torch.cat(parts), *tiers), phase)

    def _run(self, memory: np.ndarray, phase: int, last: Tensor, uniforms: Tensor, ids: Tensor, nats: Tensor) -> None:
        program, last, uniforms = self.program, last.contiguous(), uniforms.contiguous()
        number = "float" if program.dtype == np.float32 else "double"
        call = self.library[f"{'single' if program.single else 'many'}_{number}"]
        call(
            (ctypes.c_void_p * len(program.phases))(*(operations.ctypes.data for operations in program.phases)),
            *map(ctypes.c_int64, (len(program.phases), phase)),
            *map(ctypes.c_void_p, (memory.ctypes.data, program.params.ctypes.data)),
            *map(ctypes.byref, (self.tables, self.drawing)),
            *map(ctypes.c_int64, (len(last), self.model.config.levels, ids.shape[1])),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (last, uniforms, ids, nats)),
        )
