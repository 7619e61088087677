"""What is known of each piece of memory, by storage, held so that an address is never taken for another's."""

from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nanhunt.observe.finite import stored_values, unreadable_kind

NO_BIRTHS: frozenset[int] = frozenset()


@dataclass
class Storage:
    """What is known of one piece of memory.

    Attributes:
        ref: Holds the address, not the values.
        births: Indices of the births whose non-finite values it may hold.
        own: Those among them that were in it before the step.
        uninitialised: Whether nothing was written to it yet.
    """

    ref: StorageWeakRef
    births: frozenset[int] = NO_BIRTHS
    own: frozenset[int] = NO_BIRTHS
    uninitialised: bool = False


class Memory:
    """The storages seen so far; the values themselves are freed as soon as the traced program lets go of them."""

    def __init__(self) -> None:
        self._storages: dict[int, Storage] = {}

    def __len__(self) -> int:
        return len(self._storages)

    def find(self, tensor: Tensor) -> Storage | None:
        """What is known of the tensor's memory; None if it was not seen before."""
        return self._storages.get(storage_key(tensor))

    def add(self, tensor: Tensor) -> Storage:
        """Begins to follow the tensor's memory."""
        state = Storage(StorageWeakRef(stored_values(tensor).untyped_storage()))
        self._storages[state.ref.cdata] = state
        return state

    def purge(self) -> None:
        """Forgets memory that is gone, so that a long trace stays small."""
        self._storages = {key: state for key, state in self._storages.items() if not state.ref.expired()}


def storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's memory; 0 for tensors without any."""
    return stored_values(tensor).untyped_storage()._cdata if unreadable_kind(tensor) is None else 0


def covers_storage(tensor: Tensor) -> bool:
    """Whether the tensor is the whole of its memory."""
    values = stored_values(tensor)
    return values.numel() * values.element_size() >= values.untyped_storage().nbytes()
