"""DeepSpeed's ZeRO in place of DDP: optimizer state (stage 1), gradients (2) and weights (3) divided over the ranks.

The trainer's steps are the same. The engine is driven here and not through Accelerate, whose wrapper updates the
weights within `backward`, before the norm of the gradient is known. Parameters stay float32: precision is DeepSpeed's
`torch_autocast`, because its `bf16` and `fp16` modes cast every parameter, the state spaces' too.
"""

import copy
import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sashimi import atomic
from sashimi.distributed import Distributed, deepspeed_file
from sashimi.errors import InputError

# What DeepSpeed's configuration must leave out, and the fields of a run that decide it.
DECIDED = {
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
}
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}

# As torch.amp.GradScaler's defaults.
FIRST_SCALE, GROWTH_STEPS = 65536.0, 2000

# Objects of DeepSpeed's own classes in its optimizer's state; without them it is tensors, numbers and texts.
OBJECTS = ("loss_scaler", "zero_stage", "param_slice_mappings")


def join(timeout_minutes: float = 30) -> Distributed:
    """This process among those that were started to train: with ZeRO if the launcher asks for DeepSpeed, else DDP."""
    file = deepspeed_file()
    return Distributed(timeout_minutes) if file is None else Zero(file, timeout_minutes)


def read_config(file: str) -> dict[str, Any]:
    """A DeepSpeed configuration that this project can keep its promises with; InputError naming what it cannot."""
    if not file:
        raise InputError(
            "DeepSpeed without a configuration: start with accelerate launch --config_file launch/accelerate/zero2.yaml"
        )
    config = atomic.read_json(Path(file))
    for name in ("zero_optimization", "torch_autocast", "bf16", "fp16"):
        if not isinstance(config.setdefault(name, {}), dict):
            raise InputError(f"{file}: {name} must be an object, as in launch/deepspeed")
    zero, autocast = config["zero_optimization"], config["torch_autocast"]
    if zero.get("stage") not in (1, 2, 3):
        raise InputError(f"{file}: zero_optimization.stage must be 1, 2 or 3; without ZeRO, start without DeepSpeed")
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) is not None:
            raise InputError(f"{file}: zero_optimization.{name} is not supported; leave it out")
    for name in ("bf16", "fp16"):
        if config[name].get("enabled", False):
            raise InputError(
                f"{file}: {name}.enabled casts the state spaces; set it to false and use torch_autocast, see "
                "launch/deepspeed"
            )
    for name, field in DECIDED.items():
        if name in config:
            raise InputError(f"{file}: {name} is decided by {field} of the run; leave it out")
    if config.get("gradient_clipping", 0):
        raise InputError(f"{file}: gradient_clipping={config['gradient_clipping']}: set it to 0.0; optim.clip decides")
    if autocast.setdefault("lower_precision_safe_modules", []) or config.get("communication_data_type"):
        raise InputError(
            f"{file}: torch_autocast.lower_precision_safe_modules must be [] and communication_data_type left out, or "
            "gradients are exchanged in lower precision"
        )
    if autocast.get("enabled", False) and autocast.get("dtype") not in PRECISIONS:
        raise InputError(f"{file}: torch_autocast.dtype={autocast.get('dtype')}: must be bfloat16 or float16")
    return config


class Zero(Distributed):
    """A process whose trainer's engine is DeepSpeed's, at stage `zero_stage`."""

    def __init__(self, file: str, timeout_minutes: float = 30) -> None:
        """Args: file: a DeepSpeed configuration, JSON. InputError for one that will not do."""
        self.config = read_config(file)
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError("DeepSpeed is not installed: pip install 'sashimi[deepspeed]', or start without it")
        # DeepSpeed wants numbers here, for its reports; the trainer feeds it micro-batches as the run's fields say.
        self.config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        super().__init__(timeout_minutes)
        import deepspeed

        try:
            deepspeed.DeepSpeedConfig(self.config)
        except (ValueError, AssertionError) as error:
            reason = " ".join(str(error).split()).partition(" For further")[0]
            raise InputError(f"{file}: DeepSpeed does not take it: {reason}") from None
        if self.precision != "no":
            raise InputError(
                f"mixed_precision={self.precision}: DeepSpeed's precision is torch_autocast of {file}; "
                "set mixed_precision to no"
            )
        if self.world_size == 1:
            raise InputError("ZeRO divides over processes, and this is the only one; start without DeepSpeed")
        self.zero_stage = self.config["zero_optimization"]["stage"]
        autocast = self.config["torch_autocast"]
        if autocast.get("enabled", False):
            self.precision = PRECISIONS[autocast["dtype"]]
        self.scale, self.good_steps = FIRST_SCALE if self.precision == "fp16" else 1.0, 0

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """DeepSpeed's engine around the module, and its optimizer around the optimizer."""
        import deepspeed

        if self.device.type == "cpu":
            # Or it compiles collectives of its own first, for a minute; gloo's do.
            deepspeed.ops.__compatible_ops__ = {}
        if self.zero_stage == 3:
            # Before DeepSpeed hooks into the module: the same one without weights, see `whole_model`.
            self.hollow = copy.deepcopy(module).to("meta")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of its collectives
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        # DeepSpeed's own scaler for fp16 looks at this rank's share of the gradient alone, once a parameter group.
        self.optimizer.torch_autocast_gradscaler = None
        return self.engine, self.optimizer

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of `torch_autocast`, for a module that is not the engine."""
        if self.precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def synchronize_when(self, last: bool, module: nn.Module) -> AbstractContextManager[None]:
        """Tell the engine where a step ends; from stage 2 on gradients are exchanged in every micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a share of the global mean; DeepSpeed averages over the ranks, as DDP does."""
        if self.precision == "fp16":
            self.optimizer.override_loss_scale(self.scale)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Have the next update clip to `max_norm` (0: not), and return the norm of the whole gradient before that."""
        share = torch.nn.utils.get_total_norm(self._gradients())
        (square,) = self.sum(float(share) ** 2)
        norm = math.sqrt(square) / self.optimizer.loss_scale
        self.optimizer.clip_grad = max_norm
        if self.precision == "fp16":
            self._adapt_scale(math.isfinite(norm))
        return norm

    def discard_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop a step's gradients the way DeepSpeed itself does: its step updates nothing if one is not finite."""
        if self.is_main:
            self._gradients()[0].view(-1)[0] = math.nan
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def loss_scale(self) -> dict[str, Any]:
        """The fp16 loss scale as JSON, empty in other precisions."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.precision == "fp16" else {}

    @loss_scale.setter
    def loss_scale(self, state: dict[str, Any]) -> None:
        if self.precision == "fp16" and state:
            self.scale, self.good_steps = state["scale"], state["good_steps"]

    @contextmanager
    def whole_model(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within: the model, a part of what was prepared; at stage 3 a copy with its whole weights, to read and run.

        All ranks enter together. What is divided runs on all ranks at once only, and is gathered layer by layer.
        """
        if self.zero_stage < 3:
            yield model
            return
        import deepspeed

        name = next(name for name, part in self.engine.module.named_modules() if part is model)
        whole = copy.deepcopy(self.hollow.get_submodule(name)).to_empty(device=self.device)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            whole.load_state_dict(model.state_dict())
        yield whole

    def optimizer_part(self) -> bytes:
        """This rank's share of weights and optimizer state, pickled: what `restore_optimizer_part` takes."""
        state = {key: value for key, value in self.optimizer.state_dict().items() if key not in OBJECTS}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def restore_optimizer_part(self, file: Path) -> None:
        """Put back what `optimizer_part` returned on this rank. Hyperparameters stay as they are. All ranks call it."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        shapes, saved = ([part.shape for part in _weights(held)] for held in (self.optimizer.state_dict(), state))
        if shapes != saved:
            raise InputError(
                f"{file}: zero_optimization divided the weights otherwise; put its settings back, or start another run "
                "from its weights with --init-from and a new --name"
            )
        state["loss_scaler"] = self.optimizer.loss_scaler
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict([state] * self.world_size, load_from_fp32_weights=True)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.zero_stage == 3:
            self.optimizer.checkpoint_event_epilogue()
        else:
            self.optimizer.update_lp_params()

    def _gradients(self) -> list[Tensor]:
        """This rank's share of the step's gradient, averaged over the ranks and still scaled."""
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group]

    def _adapt_scale(self, finite: bool) -> None:
        """The scale of the next step: half after an overflow, twice after enough steps without one."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0


def _weights(state: dict[str, Any]) -> list[Tensor]:
    """A rank's share of the weights in DeepSpeed's optimizer state, at stage 1 and 2 or 3."""
    return state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"]
