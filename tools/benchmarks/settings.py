"""What all parts of the bench have in common: their options, and what belongs beside every figure."""

import datetime
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sashimi.errors import InputError


@dataclass(frozen=True)
class Settings:
    """What is measured, and how large it is. A part gives its own defaults and adds its own options."""

    json: bool = False
    """Print one line of JSON instead of a table."""
    compare: str | None = None
    """File of lines that --json printed before: show what has changed since the last one of this part."""
    length: int = 16000
    """Samples of a segment."""
    batch_size: int = 2
    """Segments of a batch."""
    n_layers: int = 2
    """Layers a tier."""
    threads: int = 0
    """Threads of torch; 0: as it is set. Generation takes one."""
    repetitions: int = 5
    """Repetitions of each figure, of which the median counts."""

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 1024:
            raise InputError(f"threads={self.threads}: give 1 to 1024, or 0 for as many as are set")
        for name in ("length", "batch_size", "n_layers", "repetitions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")


def about(device: torch.device) -> dict[str, Any]:
    """Where and when figures were taken."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """Linux knows the model; elsewhere the architecture must do."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"(?m)^model name\s*: (.+)$", info.read_text()) if info.exists() else []
    return models[0] if models else platform.processor() or platform.machine()
