"""Which weights and optimizer state are known to be finite, so that an overflow in a step is told from what was there.

Every write of a traced step is looked at; what else writes to state, such as a checkpoint that is loaded, counts its
version up between the steps, and is looked at before the next one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.observe.finite import is_finite, list_is_finite
from nanhunt.observe.memory import Memory
from nanhunt.observe.modes import untraced
from nanhunt.observe.values import state_tensors


def look_before_step(memory: Memory, optimizer: Optimizer) -> list[Tensor]:
    """Looks at what has changed unseen since the last step, or is new; returns what of it is non-finite."""
    changed = [tensor for tensor in _kept(optimizer) if memory.is_changed(tensor)]
    if not changed:
        return []
    with untraced(), torch.no_grad():
        bad = [] if list_is_finite(changed) else [tensor for tensor in changed if not is_finite(tensor)]
        for tensor in changed:
            if all(tensor is not found for found in bad):
                memory.note_finite(tensor)
    return bad


def note_step(memory: Memory, optimizer: Optimizer) -> None:
    """The step has ended: what it wrote was looked at."""
    for tensor in _kept(optimizer):
        memory.note_version(tensor)


def _kept(optimizer: Optimizer) -> Iterator[Tensor]:
    """Its parameters and their state, without the step counters, as far as they are plain tensors."""
    for group in optimizer.param_groups:
        yield from (parameter for parameter in group["params"] if _is_plain(parameter))
    yield from (value for _, key, value in state_tensors(optimizer) if key != "step" and _is_plain(value))


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor)
    return (kind is Tensor or kind is nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
