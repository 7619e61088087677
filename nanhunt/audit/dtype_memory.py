"""What is known of the memory of tensors while a step runs."""

from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Fact = TypeVar("Fact")


class MemoryNotes(Generic[Fact]):
    """A note for each piece of memory; views share it, and it goes when the memory does."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[StorageWeakRef, Fact]] = {}

    def put(self, tensor: Tensor, fact: Fact) -> None:
        """Notes it for the memory of this tensor."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._notes[reference.cdata] = reference, fact
        if len(self._notes) % 4096 == 0:
            self._notes = {key: note for key, note in self._notes.items() if not note[0].expired()}

    def get(self, tensor: Tensor) -> Fact | None:
        """What was noted; None if nothing was."""
        # The reference keeps the address taken, so it cannot come again for other memory.
        note = self._notes.get(tensor.untyped_storage()._cdata)
        return note[1] if note is not None and not note[0].expired() else None

    def drop(self, tensor: Tensor) -> None:
        """Forgets it."""
        self._notes.pop(tensor.untyped_storage()._cdata, None)
