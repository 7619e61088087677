"""The states of all random generators a step can draw from, as plain containers and tensors."""

import random
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class RawStates(NamedTuple):
    """The states as the generators give them.

    They are taken every step and stored hardly ever; turning them into tensors takes longer than taking them. NumPy's
    is taken even if its words have not moved: a normal draw that it holds back is not among them.
    """

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    cuda: list[Tensor] | None

    @classmethod
    def now(cls) -> Self:
        """The states at this moment; CUDA's where it is in use."""
        return cls(
            random.getstate(),
            np.random.get_state(legacy=True),  # noqa: NPY002 - the global one is meant
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        )


def rng_state(raw: RawStates | None = None) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, CUDA included where it is in use; by default those of now."""
    raw = raw or RawStates.now()
    version, internal, gauss = raw.python
    kind, keys, position, has_gauss, cached = raw.numpy
    state: dict[str, Any] = {
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": raw.torch,
    }
    if raw.cuda is not None:
        state["cuda"] = raw.cuda
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts all generators back to what ``rng_state`` gave."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
