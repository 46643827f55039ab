"""What weak scaling must come to on many GPUs, of which one was measured: a calculation, every assumption an option."""

import math
from dataclasses import dataclass

import torch

from benchmarks.settings import Settings
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi

_BUCKETS = 1 << 20, 25 << 20  # bytes of gradients that DDP reduces at once: first, and then


@dataclass(frozen=True)
class ProjectSettings(Settings):
    """The job, and what is assumed of GPUs and network."""

    n_layers: int = 8
    """Layers a tier."""
    batch_size: int = 8
    """Segments of a batch, on each GPU."""
    global_batch: int = 32
    """Segments of a batch in all, where that is kept."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    samples_per_s: float = 4.3e6
    """Samples a second that a GPU trains on when its batch is large; measured on one H200."""
    launch_s: float = 0.0137
    """Least seconds of a step, however small its batch; measured on one H200."""
    nvlink_gb_per_s: float = 200
    """Assumed: GB/s of all-reduce traffic a GPU within a node."""
    network_gb_per_s: float = 20
    """Assumed: GB/s of all-reduce traffic a GPU between nodes (InfiniBand, a 200 Gbit/s card a GPU)."""
    hop_s: float = 1e-5
    """Assumed: latency of a hop of an all-reduce."""
    sync_s: float = 1e-4
    """Assumed: what it costs to wait for the GPU and launch anew, for each of the small all-reduces' results."""
    jitter: float = 0.02
    """Assumed: spread of a rank's step time, as a share of it."""
    bytes_per_sample: float = 1.1
    """Bytes of a shard a sample: 16-bit FLAC of speech."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gpus or min(self.gpus) < 2:
            raise InputError(f"gpus={list(self.gpus)}: give numbers of at least 2")
        if self.gpus_per_node < 1:
            raise InputError(f"gpus_per_node={self.gpus_per_node}: must be at least 1")
        if self.global_batch < 2:
            raise InputError(f"global_batch={self.global_batch}: must be at least 2, to be divided")
        for name in ("samples_per_s", "nvlink_gb_per_s", "network_gb_per_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("launch_s", "hop_s", "sync_s", "jitter", "bytes_per_sample"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must be 0 or more")


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of a step on W GPUs go."""

    compute: float  # of one GPU alone
    wait: float  # for the slowest of W
    transfer: float  # of gradients, by bandwidth
    latency: float  # of the large and the small all-reduces, by hops and synchronization

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.compute + self.wait + self.transfer + self.latency


def compute_time(config: ProjectSettings, batch_size: int) -> float:
    """Seconds of a step of one GPU alone: max(launch, batch · length / rate)."""
    return max(config.launch_s, batch_size * config.length / config.samples_per_s)


def step_time(config: ProjectSettings, gradient_bytes: float, gpus: int, batch_size: int) -> StepTime:
    """The calculation, with `batch_size` segments on each of W GPUs.

    The expected largest of W normal step times is √(2 ln W) spreads above the mean. A ring sends 2 (W − 1)/W of the
    gradients' bytes through each GPU's slowest link, after the backward pass, which is launched as a whole and hides
    nothing. Latency is 2 log₂ W hops (up and down a tree) for each of DDP's buckets and for each of two small
    all-reduces (the count before the forward pass, the nats after the backward), whose results the host also waits for.
    """
    compute = compute_time(config, batch_size)
    inside = gpus <= config.gpus_per_node
    bandwidth = 1e9 * (config.nvlink_gb_per_s if inside else config.network_gb_per_s)
    first, more = _BUCKETS
    buckets = 1 + math.ceil(max(gradient_bytes - first, 0) / more)
    return StepTime(
        compute,
        wait=compute * config.jitter * math.sqrt(2 * math.log(gpus)),
        transfer=2 * (gpus - 1) / gpus * gradient_bytes / bandwidth,
        latency=(buckets + 2) * 2 * math.log2(gpus) * config.hop_s + 2 * config.sync_s,
    )


def bench_project(config: ProjectSettings, device: torch.device) -> dict[str, float]:
    """For each number of GPUs what becomes of a step; measures nothing.

    speedup: samples a second in relation to one GPU, at the same batch a GPU. reads_per_s, read_mb_per_s: segments and
    bytes from the shards, then.
    same_batch_speedup: steps a second in relation to one GPU that takes the whole of `global_batch`; GPUs beyond one a
    segment have nothing to do.
    """
    weights = sum(p.numel() for p in Sashimi(ModelConfig(n_layers=config.n_layers)).parameters())
    result: dict[str, float] = {"parameters": weights, "gradient_mb": 4 * weights / 1e6}
    for gpus in config.gpus:
        time = step_time(config, 4 * weights, gpus, config.batch_size)
        busy = min(gpus, config.global_batch)
        same = step_time(config, 4 * weights, busy, math.ceil(config.global_batch / busy))
        reads = gpus * config.batch_size / time.total
        figures = {
            "step_ms": 1e3 * time.total,
            "compute_share": time.compute / time.total,
            "wait_share": time.wait / time.total,
            "transfer_share": time.transfer / time.total,
            "latency_share": time.latency / time.total,
            "speedup": gpus * time.compute / time.total,
            "global_batch": gpus * config.batch_size,
            "reads_per_s": reads,
            "read_mb_per_s": reads * config.length * config.bytes_per_sample / 1e6,
            "same_batch_speedup": compute_time(config, config.global_batch) / same.total,
        }
        result |= {f"{gpus}_gpus_{name}": value for name, value in figures.items()}
    return result
