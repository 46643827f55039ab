"""A training step's forward and backward passes as two CUDA graphs, recorded once and launched at once ever after.

The kernels of a step are many and most of them small, so that a GPU waits for Python to launch them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sashimi.errors import Unavailable, first_reason
from sashimi.objective import Objective


def record(
    objective: Objective,
    inputs: tuple[Tensor, ...],
    autocast: Callable[[], AbstractContextManager[None]],
    accumulate: bool,
) -> None:
    """From now on a training pass of `objective` is launched as a whole; its inputs are of the shapes of `inputs`.

    In evaluation it runs as before. `autocast` gives the precision of the forward pass. With `accumulate`, gradients
    may be added up over several passes. Raises Unavailable, and then `objective` is what it was.
    """
    forward = objective.forward

    def cast(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with autocast():  # in here, because the backward pass is recorded where this function is called
            return forward(*inputs)

    # Weights' gradients belong to the stream that recorded them, which waits for training's; that costs an event.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    objective.train()
    objective.forward = cast  # type: ignore[method-assign,assignment]
    try:
        with _stream_of_now(inputs[0].device):
            torch.cuda.make_graphed_callables(objective, inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        del objective.forward
        raise Unavailable(f"no CUDA graph could be recorded: {first_reason(error)}") from error
    replay = objective.forward

    def fresh(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = replay(*inputs)  # in memory that the next pass writes to
        if isinstance(outputs, Tensor):
            return outputs.clone()
        nats, *carried = outputs
        return nats.clone(), *(tensor.detach().clone() for tensor in carried)

    objective.forward = fresh  # type: ignore[method-assign,assignment]
    if accumulate:
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.clone)  # gradients are in such memory too


def _stream_of_now(device: torch.device) -> AbstractContextManager[None]:
    """After it the stream is what it was before, which a recording that is cut short does not see to."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()
