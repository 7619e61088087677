"""What collectives send and receive: where a non-finite value leaves this process, and where one arrives.

NOTE on what can be known.

1. A collective may still be running when it returns. Its result is never looked at there; the memory is marked as
   received, and the first operation that moves a value out of it, or computes with it, looks.
2. What this process hands over is there already: a non-finite gradient is judged before the collective smears it.
3. What was handed over non-finite and what comes back cannot be told apart: it counts as this process's own.
4. Some backends copy the result to its place only where the program waits for it, from memory that nothing has seen.
"""

from typing import Any

import torch
from torch import Tensor

from nanhunt.observe.call import Call, Origin
from nanhunt.observe.finite import is_finite, unreadable_kind, value_facts
from nanhunt.observe.memory import Memory, storage_key
from nanhunt.observe.op_info import OpTraits, tensors_in, written
from nanhunt.observe.source import ForwardSite
from nanhunt.records.ops import Sink

_VIEWS = """
alias as_strided detach expand permute select slice split split_with_sizes squeeze t transpose unbind unsqueeze view
_unsafe_view _reshape_alias _record_function_enter_new _record_function_exit
"""
_VIEW_NAMES = frozenset(_VIEWS.split())


def own_part(tensor: Tensor) -> Tensor | None:
    """The piece of a distributed tensor that lies in this process; any other tensor as it is.

    None for a piece that is still on its way: to look at it would wait for it.
    """
    while (part := getattr(tensor, "_local_tensor", None)) is not None:
        tensor = part
    return None if hasattr(type(tensor), "trigger_wait") else tensor


def note_received(memory: Memory, call: Call, produced: list[Tensor], site: ForwardSite) -> None:
    """Marks what a collective writes to (rule 1 of the NOTE)."""
    for tensor in call.written or produced:
        if unreadable_kind(tensor) is not None:
            continue
        memory.note_received(tensor, site)
        memory.unwritten.pop(storage_key(tensor), None)
        if call.taint:
            memory.taint(tensor, call.taint)
        else:
            memory.clean(tensor)


def sent(call: Call, births: frozenset[int]) -> Sink:
    """What a collective is about to carry to other processes (rule 2)."""
    bad = next(tensor for tensor in call.inputs if unreadable_kind(tensor) is None and not is_finite(tensor))
    return Sink("gradient", f"what {call.traits.full_name} sent", value_facts(bad), tuple(sorted(births)))


def moves_received(memory: Memory, traits: OpTraits, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether the operation has taken values out of received memory; a view of it has not."""
    received = memory.received
    if not received or traits.name in _VIEW_NAMES:
        return False
    targets = [position for position, _ in traits.writes]
    given = [value for position, value in enumerate(args) if position not in targets]
    keys = {key for tensor in tensors_in(*given, *kwargs.values()) if (key := _key(tensor)) in received}
    return bool(keys) and not keys & {_key(tensor) for tensor in written(traits, args, kwargs) or tensors_in(output)}


def _key(tensor: Tensor) -> int:
    """As ``storage_key``, but quicker for what nearly every tensor is."""
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if is_plain else storage_key(tensor)


def ends_collective(memory: Memory, call: Call) -> bool:
    """Whether the operation is the late copy of a result (rule 4)."""
    if call.traits.name != "copy_" or call.taint or not memory.received:
        return False
    target, source = (storage_key(tensor) for tensor in call.inputs[:2])
    return target in memory.received and source not in memory.received


def origin_of_received(site: ForwardSite, reader: str) -> Origin:
    """What a non-finite value is that lay in received memory.

    Args:
        site: The collective.
        reader: The operation that met it.
    """
    if "broadcast" in site.op or ("gather" in site.op and reader.startswith("fsdp::")):
        phase = "weights"
    else:
        phase = "backward" if "reduce" in site.op else "forward"
    return Origin("collective", module=site.module, phase=phase)
