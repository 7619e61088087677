"""What autograd saved for a backward pass, read without disturbing it."""

from typing import Any


def saved(node: Any, name: str) -> Any:
    """The value saved under a name; None where there is none, or where reading it would call somebody's code.

    Checkpointing and offloading put hooks between the node and its tensors. To read through one would recompute a
    forward pass, or use up what may be unpacked once only.

    Raises:
        RuntimeError: If it has been freed, or was changed in place since.
    """
    raw = getattr(node, f"_raw_saved_{name}", None)
    for part in raw if isinstance(raw, list | tuple) else (raw,):
        # A torch that does not tell is taken to have hooks.
        if part is not None and getattr(part, "unpack_hook", part) is not None:
            return None
    return getattr(node, f"_saved_{name}", None)
