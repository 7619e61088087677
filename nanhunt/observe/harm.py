"""Looking for harm: whether tensors that matter are non-finite, and by which births."""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.observe.call import Origin
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite import is_finite, list_is_finite, unreadable_kind
from nanhunt.observe.known import KnownState
from nanhunt.observe.modes import untraced
from nanhunt.observe.values import own_parts
from nanhunt.records.ops import Sink


class Harm(KnownState):
    """Looks at inputs, losses, gradients and state, and tells the tracer what it sees.

    Args:
        tracer: Told of sources and sinks.
        model: The model; None until one was seen.
        optimizer: One optimizer, several, or None.

    Attributes:
        notes: What the loop or a ``GradScaler`` dealt with by itself, and what was not traced, counted.
    """

    def __init__(
        self, tracer: ExactTracer, model: nn.Module | None, optimizer: Optimizer | Sequence[Optimizer] | None
    ) -> None:
        super().__init__(model, optimizer)
        self.notes: Counter[str] = Counter()
        self._tracer, self._ledger = tracer, tracer.ledger
        self._thread = threading.get_ident()

    def _declare(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        listed = list(own_parts(named))
        with untraced(), torch.no_grad():
            readable = [tensor for _, tensor in listed if unreadable_kind(tensor) is None]
            if list_is_finite(readable):
                return
        self._tracer.declare(kind, listed, here=kind == "batch")

    def _declare_roots(self, roots: Sequence[Tensor]) -> None:
        """A loss that is non-finite for no recorded reason was made where nobody looked."""
        if threading.get_ident() != self._thread:
            self.notes["backward passes in another thread, which were not traced"] += 1
            return
        with untraced(), torch.no_grad():
            for root in roots:
                known = self._ledger.memory.births_of(root)
                if not known and unreadable_kind(root) is None and not is_finite(root):
                    self._ledger.declare(Origin("constant", "loss", phase="forward"), root, self._tracer.places.here())

    def _declare_received(self, parameters: Iterable[Tensor]) -> None:
        """Gradients that a collective may have written are looked at once it must have ended."""
        if self._ledger.memory.received:
            with untraced(), torch.no_grad():
                given = [part for _, part in own_parts(("", p.grad) for p in parameters if p.grad is not None)]
                if not list_is_finite(given):
                    for gradient in (part for part in given if unreadable_kind(part) is None):
                        self._ledger.declare_received(gradient)

    def _harmed_gradients(self, parameters: Iterable[Tensor]) -> list[Sink]:
        names = {id(tensor): name for kind, name, tensor in self.named_tensors() if kind == "parameter"}
        num_before = len(self._ledger.sinks)
        self._reached(
            "gradient",
            [(names.get(id(p), "a parameter outside the model"), p.grad) for p in parameters if p.grad is not None],
        )
        fresh = self._ledger.sinks[num_before:]
        del self._ledger.sinks[num_before:]
        return fresh

    def _reached(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        """Only memory that is known to be non-finite is looked at."""
        find = self._ledger.memory.find
        self._tracer.reached(kind, [(name, tensor) for name, tensor in own_parts(named) if find(tensor) is not None])
