"""What a training loop does, shown to the exact tracer: forward and backward passes, steps, and where values do harm.

NOTE on what counts as harm, and when it is certain.

1. A loss is the root of a backward pass; a gradient is looked at when the backward pass ends, and is harm when the
   optimizer steps. A loop that drops the step by itself and goes on has dealt with it.
2. What a ``GradScaler`` skips because of its own scale it has dealt with as well. It has not where no scale helps: the
   births do not hang on the scale, or the scale has collapsed.
3. Without a backward pass the model's output is what counts: in evaluation at once, in training if the loop ends there.
4. Tensors are looked at only while some memory is known to be non-finite: a healthy loop pays nothing for it.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from nanhunt.observe.collectives import own_part
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite import list_is_finite, unreadable_kind
from nanhunt.observe.health import HealthProbe
from nanhunt.observe.holders import holder_of, unwrapped
from nanhunt.observe.modes import untraced
from nanhunt.observe.patches import Patches
from nanhunt.observe.scaling import ScalingFollower, is_passed_over
from nanhunt.records.ops import Sink

Outputs = Literal["auto", "always", "never"]


class LoopFollower:
    """Follows a loop through hooks on modules and optimizers, and through stand-ins for what starts a backward pass.

    Args:
        tracer: Told of steps, sources and sinks.
        model: The model; None to take the first module with parameters that is called.
        optimizer: The optimizer whose steps are counted; None for the first that steps.
        outputs: When the model's output is a sink: ``auto`` without a backward pass, ``always``, ``never``.
        health: Told of steps and optimizers as well; None where nobody asks for finite trouble.

    Attributes:
        optimizers: Those seen so far.
        notes: What the loop or a ``GradScaler`` dealt with by itself, counted.
    """

    def __init__(
        self,
        tracer: ExactTracer,
        model: nn.Module | None,
        optimizer: Optimizer | None,
        outputs: Outputs = "auto",
        health: HealthProbe | None = None,
    ) -> None:
        self.model = self._called = model
        self.optimizers: list[Optimizer] = [optimizer] if optimizer is not None else []
        self.notes: Counter[str] = Counter()
        self._tracer, self._ledger = tracer, tracer.ledger
        self._main, self._outputs, self._health = optimizer, outputs, health
        self._parameter_names: dict[int, str] = {}
        self._pending: list[Sink] = []
        self._abandoned: list[Sink] = []
        self._went_backward = False
        self._is_entered = False
        self._fault_step: int | None = None
        self._handles: list[Any] = []
        self._patches = Patches(self._tracer.guarded)
        self._scaling = ScalingFollower(tracer, self._pending, self._meet_optimizer, self._on_skip, health)

    def __enter__(self) -> Self:
        if self.model is not None:
            self._meet(self.model, "")
        for optimizer in self.optimizers:
            self._declare_state(optimizer)
        self._tracer.path.on_enter = self._on_enter
        self._tracer.path.on_leave = self._on_leave
        if self._health is not None:
            self._tracer.guarded(self._health.begin_step, 0)
        self._handles += [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._patches.around(torch.autograd, "backward", self._begin_backward, self._end_backward)
        self._patches.around(torch.autograd, "grad", self._begin_grad, None)
        self._scaling.patch(self._patches)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._patches.undo()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tracer.path.on_enter = self._tracer.path.on_leave = None
        self._tracer.guarded(self._finish)

    def named_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, name and value of every parameter and buffer of the model."""
        if self.model is not None:
            for name, parameter in self.model.named_parameters():
                yield "parameter", name, parameter
            for name, buffer in self.model.named_buffers():
                yield "buffer", name, buffer

    # Forward.

    def _meet(self, module: nn.Module, prefix: str) -> None:
        """A module that was not seen before: its state is looked at, and its parts get their names."""
        self._tracer.path.name_modules(module, prefix)
        if module is self.model and self._health is not None:
            self._health.attach(dict(module.named_modules()))
        for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            self._declare(kind, ((f"{prefix}.{name}" if prefix else name, tensor) for name, tensor in named))

    def _declare(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        listed = list(_own_parts(named))
        with untraced(), torch.no_grad():
            readable = [tensor for _, tensor in listed if unreadable_kind(tensor) is None]
            if list_is_finite(readable):
                return
        self._tracer.declare(kind, listed, here=kind == "batch")

    def _on_enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._tracer.guarded(self._enter, module, args, kwargs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.model is None and next(module.parameters(), None) is not None:
            # A trainer may call a part of what its user knows as the model.
            self.model, self._called = holder_of(module), unwrapped(module)
            self._meet(self.model, "")
        is_model = self._is_model(module)
        if not self._tracer.path.knows(module) and next(module.parameters(), None) is not None:
            # A wrapper is the model to whoever calls it.
            self._meet(module, "" if is_model else f"<{type(module).__name__}>")
        self._declare_inputs(args, kwargs)
        if is_model:
            self._is_entered = True
            self._tracer.is_past_backward = False
            self._tracer.note_driver()
            if torch.is_grad_enabled():
                self._begin_part()

    def _declare_inputs(self, args: Any, kwargs: Any) -> None:
        named = [(str(position), value) for position, value in enumerate(args)] + list(kwargs.items())
        tensors = [
            (f"input {name}", leaf) for name, value in named for leaf in tree_leaves(value) if isinstance(leaf, Tensor)
        ]
        self._declare("batch", tensors)
        if self._tracer.is_watchful:
            self._ledger.fed.update(*(self._ledger.memory.births_of(tensor) for _, tensor in _own_parts(tensors)))

    def _on_leave(self, module: nn.Module, output: Any) -> None:
        if self._tracer.is_watchful and self._is_model(module):
            self._tracer.guarded(self._look_at_output, module, output)

    def _look_at_output(self, module: nn.Module, output: Any) -> None:
        self._reached("buffer", module.named_buffers())
        if self._outputs == "never":
            return
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        num_before = len(self._ledger.sinks)
        self._reached("output", [(f"output {number}", leaf) for number, leaf in enumerate(leaves)])
        is_certain = self._outputs == "always" or not torch.is_grad_enabled() or not module.training
        if not is_certain:
            self._abandoned = self._ledger.sinks[num_before:]
            del self._ledger.sinks[num_before:]

    def _is_model(self, module: nn.Module) -> bool:
        """Whether it is the model, or the part of it that is called, or wraps it."""
        called = self._called
        return module is called or (called is not None and any(part is called for part in module.modules()))

    def _begin_part(self) -> None:
        """A forward pass for training begins: the next step, or the next part of an accumulated one."""
        if self._abandoned or self._ledger.read_numbers:
            self.notes["non-finite losses that the loop dropped"] += 1
            self._abandoned = []
            self._ledger.read_numbers.clear()
        if not self._went_backward:
            return
        self._went_backward = False
        has_gradients = any(parameter.grad is not None for parameter in self._parameters())
        if self.optimizers and not has_gradients and self._pending:
            self.notes["steps with non-finite gradients that the loop dropped"] += 1
            self._pending.clear()
        if self.optimizers or has_gradients:
            self._ledger.micro_step += 1
        else:
            self._end_step()

    # Backward.

    def _begin_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        self._abandoned = []
        self._ledger.read_numbers.clear()
        self._ledger.sent.clear()
        self._ledger.memory.last_received = None
        self._tracer.note_driver()
        if self._tracer.is_watchful:
            roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            num_before = len(self._ledger.sinks)
            self._reached("loss", [("loss", root.detach()) for root in roots])
            fresh = self._ledger.sinks[num_before:]
            if self._ledger.is_scaled and all(set(sink.births) <= self._ledger.scaling for sink in fresh):
                del self._ledger.sinks[num_before:]
                self._pending += fresh

    def _end_backward(self, *args: Any, **kwargs: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            self._ledger.reached_by_error(error)
        self._went_backward = True
        self._tracer.is_past_backward = True
        self._ledger.read_numbers.clear()
        self._declare_received(self._parameters())
        if self._tracer.is_watchful:
            fresh = self._harmed_gradients(self._parameters())
            harmed = {birth for sink in fresh for birth in sink.births}
            fresh += [sink for sink in self._ledger.sent if not set(sink.births) <= harmed]
            if self.optimizers:
                self._pending += fresh
            else:
                self._ledger.sinks += fresh

    def _begin_grad(self, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """``torch.autograd.grad`` hands its results back: what becomes of them decides."""
        self._abandoned = []
        self._ledger.read_numbers.clear()

    def _declare_received(self, parameters: Iterable[Tensor]) -> None:
        """Gradients that a collective may have written are looked at once it must have ended."""
        if self._ledger.memory.received:
            with untraced(), torch.no_grad():
                given = [part for _, part in _own_parts(("", p.grad) for p in parameters if p.grad is not None)]
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
        self._tracer.reached(kind, [(name, tensor) for name, tensor in _own_parts(named) if find(tensor) is not None])

    def _parameters(self) -> Iterator[Tensor]:
        seen: set[int] = set()
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        own = list(self.model.parameters()) if self.model is not None else []
        for parameter in (parameter for part in (own, *groups) for parameter in part):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    # Steps.

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._tracer.guarded(self._meet_optimizer, optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._tracer.guarded(self._confirm_gradients, optimizer)
            self._tracer.set_phase("optimizer")
            return None

        def followed() -> Any:
            self._tracer.set_phase("forward")
            value = closure()
            self._tracer.guarded(self._confirm_gradients, optimizer)
            self._tracer.set_phase("optimizer")
            return value

        self._tracer.set_phase("optimizer")
        if len(args) > 1:
            return (args[0], followed, *args[2:]), kwargs
        return args, {**kwargs, "closure": followed}

    def _meet_optimizer(self, optimizer: Optimizer) -> None:
        if all(known is not optimizer for known in self.optimizers):
            self.optimizers.append(optimizer)
            self._main = self._main or optimizer
            self._declare_state(optimizer)

    def _declare_state(self, optimizer: Optimizer) -> None:
        self._declare("optimizer state", optimizer_tensors(self.model, optimizer))

    def _confirm_gradients(self, optimizer: Optimizer) -> None:
        """Rule 1: the optimizer takes the gradients as they are."""
        if is_passed_over(optimizer):
            return
        if self._health is not None:
            self._health.before_optimizer_step(optimizer, self._names_of(optimizer))
        self._ledger.sinks += self._pending
        self._pending.clear()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._declare_received(parameters)
        if self._tracer.is_watchful:
            known = {birth for sink in self._ledger.sinks for birth in sink.births}
            fresh = self._harmed_gradients(parameters)
            self._ledger.by_hand |= {birth for sink in fresh for birth in sink.births} - known
            self._ledger.sinks += fresh

    def _names_of(self, optimizer: Optimizer) -> dict[int, str]:
        """Names of the model's parameters by identity, worked out anew when the optimizer holds an unknown one."""
        if any(id(parameter) not in self._parameter_names for parameter in optimizer.param_groups[-1]["params"]):
            named = {id(tensor): name for kind, name, tensor in self.named_tensors() if kind == "parameter"}
            groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            outside = {id(parameter): f"parameter {number}" for number, parameter in enumerate(groups)}
            self._parameter_names = {**self._parameter_names, **outside, **named}
        return self._parameter_names

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tracer.set_phase("forward")
        self._tracer.guarded(self._look_at_step, optimizer)

    def _look_at_step(self, optimizer: Optimizer) -> None:
        if self._tracer.is_watchful and not is_passed_over(optimizer):
            names = {id(tensor): name for _, name, tensor in self.named_tensors()}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._reached("parameter", [(names.get(id(p), "a parameter"), p.detach()) for p in parameters])
            self._reached("optimizer state", optimizer_tensors(self.model, optimizer))
        if self._health is not None:
            self._health.after_optimizer_step(optimizer, self._names_of(optimizer))
        self._scaling.note_step(optimizer)
        if optimizer is self._main:
            self._end_step()
        else:
            self._ledger.micro_step = 0
            self._went_backward = False

    def _on_skip(self, optimizer: Optimizer) -> None:
        """A ``GradScaler`` left the optimizer's step out."""
        self.notes["steps that the GradScaler skipped"] += 1
        if optimizer is self._main:
            self._end_step()

    def _end_step(self) -> None:
        if self._ledger.has_fault:
            if self._fault_step is None:
                self._fault_step = self._ledger.step
            elif self._ledger.step > self._fault_step:
                # All that follows is symptoms; the loop gets its speed back.
                self._tracer.is_passive = True
        self._ledger.step += 1
        self._ledger.micro_step = 0
        self._went_backward = False
        self._ledger.is_scaled = False
        if not self._is_entered:
            # Without modules nothing else tells where the next step begins.
            self._tracer.is_past_backward = False
        self._tracer.end_step()
        if self._health is not None:
            self._tracer.guarded(self._health.begin_step, self._ledger.step)

    def _finish(self) -> None:
        """The loop has ended: what was not dealt with counts."""
        self._ledger.sinks += self._pending
        self._pending.clear()
        if not self._tracer.is_past_backward:
            self._ledger.sinks += list(self._ledger.read_numbers.values()) or self._abandoned
        if self._tracer.is_watchful:
            self._reached("parameter", [(n, t.detach()) for kind, n, t in self.named_tensors() if kind == "parameter"])
            self._reached("buffer", [(name, tensor) for kind, name, tensor in self.named_tensors() if kind == "buffer"])


def _own_parts(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What of the tensors lies in this process."""
    return ((name, part) for name, tensor in named if (part := own_part(tensor)) is not None)


def optimizer_tensors(model: nn.Module | None, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state as ``exp_avg of encoder.0.weight``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()} if model is not None else {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{key} of {names.get(id(parameter), 'an unnamed parameter')}", value
