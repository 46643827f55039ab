"""Where a run is: the part of a checkpoint's state.json that the trainer goes on from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sashimi.errors import InputError
from sashimi.optim import Plateau

_OTHER_STATE = "not what this version saves; start another run from its weights with --init-from and a new --name"
_TYPES: dict[str, tuple[type, ...]] = {  # of a RunState's fields; whole numbers from 0
    **dict.fromkeys(("position", "skipped", "bad", "plateau.bad"), (int,)),
    "best_step": (int, type(None)),
    **dict.fromkeys(("best_bits", "plateau.best"), (int, float, type(None))),
    "plateau.factor": (int, float),
}
# And of what else a resumed run needs.
_BESIDE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("ema_updates", "world_size"), (int,)),
    "loss_scale": (dict,),
    "data": (str,),
}


@dataclass(frozen=True)
class RunState:
    """Where a run is; with weights and optimizer state, all that its future depends on."""

    step: int = 0
    position: int = 0  # segments consumed
    plateau: Plateau = field(default_factory=Plateau)
    best_step: int | None = None
    best_bits: float | None = None
    skipped: int = 0  # steps without an update, so far
    bad: int = 0  # of these, the latest in a row

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's state.json keeps, beside its step."""
        return {**asdict(self), "plateau": self.plateau._asdict()}

    @staticmethod
    def from_json(step: int, state: dict[str, Any]) -> "RunState":
        """The inverse of `to_json`. InputError naming the first field that is missing or cannot be."""
        _check(state, _TYPES)
        known = {name: state[name] for name in ("position", "best_step", "best_bits", "skipped", "bad")}
        return RunState(step=step, plateau=Plateau(*map(state["plateau"].get, Plateau._fields)), **known)


def check_state(state: Mapping[str, Any]) -> None:
    """InputError naming the first field of a state.json, beside those of a RunState, that is missing or cannot be."""
    _check(state, _BESIDE)


def _check(state: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    """InputError naming the first field that is missing or cannot be."""
    plateau = state.get("plateau")
    inner = plateau if isinstance(plateau, dict) else {}
    fields = {**state, **{f"plateau.{name}": value for name, value in inner.items()}}
    for name, kinds in types.items():
        value = fields.get(name, "missing")
        if type(value) not in kinds or (isinstance(value, int) and not 0 <= value < 1 << 63):
            raise InputError(f"the checkpoint's state.json: {name}={value}: {_OTHER_STATE}")
