"""One rank of `bench.py scale`. Three kinds of step take turns in one set of processes: of rank 0 alone, while the
others wait; of all ranks, each for itself; and of all ranks together, as in training.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.floors import synchronize
from benchmarks.scale import ScaleSettings
from sashimi.distributed import Distributed, run_command
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective
from sashimi.optim import OptimConfig, build_optimizer
from sashimi.parsing import parse


def make_step(config: ScaleSettings, dist: Distributed, prepared: bool, together: bool) -> Callable[[], None]:
    """`Trainer.step` on random ids, with its two small all-reduces and DDP's large one, or without the three."""
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers)).to(dist.device)
    parameters = list(model.parameters())
    objective: nn.Module = Objective(model)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())
    if prepared:
        objective, optimizer = dist.prepare(objective, optimizer)
    ids = torch.randint(256, (config.batch_size, config.length + 1), device=dist.device)
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)

    def total(*values: float) -> list[float]:
        return dist.sum(*values) if together else list(values)

    def step() -> None:
        count, _, _ = total(mask.numel(), False, 0)
        with dist.synchronize_when(together or not prepared, objective):
            nats = objective(ids[:, :-1], ids[:, 1:], mask)
            dist.backward(nats / count)
        dist.clip_gradients(parameters, 1.0)
        total(float(nats.detach()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def sent_bytes() -> int | None:
    """Bytes that this machine has sent so far over all its network interfaces, the loopback among them; Linux only."""
    table = Path("/proc/self/net/dev")
    if not table.exists():
        return None
    return sum(int(line.partition(":")[2].split()[8]) for line in table.read_text().splitlines()[2:])


def main() -> None:
    """Measure in turns; rank 0 prints the medians as a line of JSON."""
    config = parse(ScaleSettings, sys.argv[1:])
    torch.set_num_threads(config.threads)
    dist = Distributed(timeout_minutes=10)
    kinds = {
        "alone": make_step(config, dist, prepared=False, together=False),
        "apart": make_step(config, dist, prepared=True, together=False),
        "together": make_step(config, dist, prepared=True, together=True),
    }
    times: dict[str, list[float]] = {name: [] for name in (*kinds, "reduce")}
    sent: list[int] = []
    for turn in range(1 + config.repetitions):
        for name, step in kinds.items():
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            if name != "alone" or dist.is_main:
                step()
                synchronize()
            taken = time.perf_counter() - start
            # The step ends when the slowest rank's does. What an idle one says of its turn alone is next to nothing.
            times[name] += [max(dist.gather([taken]))] if turn else []
            after = sent_bytes()
            if turn and name == "together" and before is not None and after is not None:
                sent.append(after - before)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(10):
            dist.sum(1.0, 2.0, 3.0)
        times["reduce"].append((time.perf_counter() - start) / 10)

    def ratio(a: str, b: str) -> float:
        return statistics.median(one / other for one, other in zip(times[a], times[b], strict=True))

    alone, apart, together, reduce = (statistics.median(taken) for taken in times.values())
    weights = sum(p.numel() for p in Sashimi(ModelConfig(n_layers=config.n_layers)).parameters())
    result = {
        "alone_step_s": alone,
        "apart_step_s": apart,
        "together_step_s": together,
        "speedup": config.ranks * ratio("alone", "together"),
        "crowding_share": 1 - ratio("alone", "apart"),
        "communication_share": 1 - ratio("apart", "together"),
        "small_reduce_s": reduce,
        "gradient_mb": 4 * weights / 1e6,
        "ring_mb_per_rank": 2 * (config.ranks - 1) / config.ranks * 4 * weights / 1e6,
    }
    if sent:
        result["sent_mb_per_rank"] = statistics.median(sent) / config.ranks / 1e6
    if dist.is_main:
        print(json.dumps(result), flush=True)
    dist.close()


if __name__ == "__main__":
    run_command(main)
