"""What is known of memory that may hold non-finite values, by storage, so that an address is never taken for another's.

Finite memory is not followed at all: while nothing is non-finite there is nothing to look up.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from nanhunt.observe.finite import stored_values, unreadable_kind

NO_BIRTHS: frozenset[int] = frozenset()

_MANY = 1024

_NO_TENSORS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout))


@dataclass
class Storage:
    """What is known of one piece of memory.

    Attributes:
        ref: Holds the address, not the values.
        births: Indices of the births whose non-finite values it may hold.
        own: Those among them that were in it before the step.
    """

    ref: StorageWeakRef
    births: frozenset[int] = NO_BIRTHS
    own: frozenset[int] = NO_BIRTHS


class Memory:
    """The storages that may hold non-finite values; the values are freed as soon as the traced program lets go of them.

    Attributes:
        tainted: Storages with births, by their identity. A weak reference keeps the identity from being used again.
        unwritten: Storages that came from ``empty`` and were not yet written from end to end, and where that was.
        received: Storages that a collective wrote, so that their values may come from another process.
        finite: Storages of state that was found finite, and the version up to which all that wrote to it was looked at.
        last_received: Where the last collective of the running backward pass was.
    """

    def __init__(self) -> None:
        self.tainted: dict[int, Storage] = {}
        self.unwritten: dict[int, tuple[StorageWeakRef, Any]] = {}
        self.received: dict[int, tuple[StorageWeakRef, Any]] = {}
        self.finite: dict[int, tuple[StorageWeakRef, int]] = {}
        self.last_received: Any = None

    def find(self, tensor: Tensor) -> Storage | None:
        """What is known of the tensor's memory; None if it is not known to be tainted."""
        return self.tainted.get(storage_key(tensor))

    def is_touched_by(self, args: Any, kwargs: Any) -> bool:
        """Whether the memory of any argument is tainted; true as well where an argument has none to ask for."""
        tainted = self.tainted
        try:
            for value in args:
                kind = type(value)
                if kind is Tensor or kind is nn.Parameter:
                    if value.untyped_storage()._cdata in tainted:
                        return True
                elif kind in _NO_TENSORS:
                    continue
                elif isinstance(value, Tensor):
                    if value.untyped_storage()._cdata in tainted:
                        return True
                elif isinstance(value, list | tuple) and value and self.is_touched_by(value, None):
                    return True
            return bool(kwargs) and self.is_touched_by(kwargs.values(), None)
        except (NotImplementedError, RuntimeError):
            return True

    def births_of(self, tensor: Tensor) -> frozenset[int]:
        """The births that the tensor's memory may hold."""
        state = self.tainted.get(storage_key(tensor))
        return state.births if state is not None else NO_BIRTHS

    def taint(self, tensor: Tensor, births: frozenset[int]) -> Storage:
        """Notes that the tensor's memory holds these births, beside those it may hold elsewhere."""
        key = storage_key(tensor)
        state = self.tainted.get(key)
        if state is None:
            state = self.tainted[key] = Storage(_reference(tensor))
        state.births = births if covers_storage(tensor) else state.births | births
        return state

    def clean(self, tensor: Tensor) -> None:
        """Notes that the tensor, which is finite, was written; what lies beside it in its memory stays what it was."""
        if covers_storage(tensor):
            self.tainted.pop(storage_key(tensor), None)

    def note_unwritten(self, tensor: Tensor, where: Any) -> None:
        """Notes memory that holds whatever it held, and where it was asked for."""
        self._remember(self.unwritten, tensor, where)

    def note_received(self, tensor: Tensor, where: Any) -> None:
        """Notes memory that other processes wrote to, and where."""
        self.last_received = where
        self._remember(self.received, tensor, where)

    def received_at(self, gradient: Tensor) -> Any:
        """Where the values of a gradient that nothing else accounts for came to this process; None if nowhere.

        A communication hook may finish its work in a thread of the backend's, where nothing is seen of it.
        """
        known = self.received.get(storage_key(gradient))
        return known[1] if known is not None else self.last_received

    def note_written(self, tensor: Tensor) -> bool:
        """Notes a write; tells whether the memory was unwritten in part or whole before."""
        key = storage_key(tensor)
        if key not in self.unwritten:
            return False
        if covers_storage(tensor):
            del self.unwritten[key]
        return True

    def note_finite(self, tensor: Tensor) -> None:
        """Notes that all that the tensor's memory holds was looked at, if the tensor is the whole of it."""
        if not tensor.is_inference() and covers_storage(tensor):
            reference = _reference(tensor)
            self.finite[reference.cdata] = (reference, tensor._version)

    def is_known_finite(self, tensor: Tensor) -> bool:
        """Whether it was found finite, and only operations that are looked at can have written to it since."""
        key = storage_key(tensor)
        return key in self.finite and key not in self.received and key not in self.tainted

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether something has written to it since it was found finite; true of what never was."""
        key = stored_values(tensor).untyped_storage()._cdata
        known = self.finite.get(key)
        return (known is None or known[1] != tensor._version) and key not in self.tainted

    def note_version(self, tensor: Tensor) -> None:
        """Notes that whatever has written to it was looked at."""
        key = stored_values(tensor).untyped_storage()._cdata
        known = self.finite.get(key)
        if known is not None:
            self.finite[key] = (known[0], tensor._version)

    def purge(self) -> None:
        """Forgets memory that is gone, so that a long trace stays small."""
        self.tainted = {key: state for key, state in self.tainted.items() if not state.ref.expired()}
        self.unwritten = _alive(self.unwritten)
        self.received = _alive(self.received)
        self.finite = _alive(self.finite)

    def _remember(self, known: dict[int, tuple[StorageWeakRef, Any]], tensor: Tensor, where: Any) -> None:
        if unreadable_kind(tensor) is not None or not tensor.numel():
            return
        if len(known) >= _MANY:
            alive = _alive(known)
            known.clear()
            known.update(alive)
        reference = _reference(tensor)
        known[reference.cdata] = (reference, where)


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(stored_values(tensor).untyped_storage())


def _alive(known: dict[int, tuple[StorageWeakRef, Any]]) -> dict[int, tuple[StorageWeakRef, Any]]:
    return {key: noted for key, noted in known.items() if not noted[0].expired()}


def storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's memory; 0 for tensors without any."""
    return stored_values(tensor).untyped_storage()._cdata if unreadable_kind(tensor) is None else 0


def covers_storage(tensor: Tensor) -> bool:
    """Whether the tensor is the whole of its memory."""
    values = stored_values(tensor)
    return values.numel() * values.element_size() >= values.untyped_storage().nbytes()
