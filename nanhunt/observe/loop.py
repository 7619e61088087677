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
import weakref
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite_state import look_before_step, note_step
from nanhunt.observe.harm import Harm
from nanhunt.observe.health import HealthProbe
from nanhunt.observe.holders import holder_of, unwrapped
from nanhunt.observe.inputs import declare_inputs
from nanhunt.observe.op_info import speaks_of_values
from nanhunt.observe.patches import Patches
from nanhunt.observe.scaling import ScalingFollower, is_passed_over
from nanhunt.observe.updates import UpdateProbe
from nanhunt.observe.values import leaves_of, optimizer_tensors, state_tensors, tensors_of
from nanhunt.records.ops import Sink

Outputs = Literal["auto", "always", "never"]


class LoopFollower(Harm):
    """Follows a loop through hooks on modules and optimizers, and through stand-ins for what starts a backward pass.

    Args:
        tracer: Told of steps, sources and sinks.
        model: The model; None to take the first module with parameters that is called.
        optimizer: The optimizer whose steps are counted, of several the first; None for the first that steps.
        outputs: When the model's output is a sink: ``auto`` without a backward pass, ``always``, ``never``.
        health: Told of steps and optimizers as well; None where nobody asks for finite trouble.

    Attributes:
        optimizers: Those seen so far.
        notes: What the loop or a ``GradScaler`` dealt with by itself, counted.
        updates: What the optimizers do to the weights.
    """

    def __init__(
        self,
        tracer: ExactTracer,
        model: nn.Module | None,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        outputs: Outputs = "auto",
        health: HealthProbe | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is an nn.Module, not {type(model).__name__}: put several into an nn.ModuleList")
        super().__init__(tracer, model, optimizer)
        self._called = model
        self._main = self.optimizers[0] if self.optimizers else None
        self._outputs, self._health, self.updates = outputs, health, UpdateProbe()
        self._pending: list[Sink] = []
        self._abandoned: list[Sink] = []
        self._went_backward = False
        self._is_entered = self._is_called = self._has_trained = False
        self._evaluated: set[int] = set()
        self._roots: list[Tensor] = []
        self._bare_leaves: list[weakref.ref[Tensor]] = []
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
        self._patches.around(torch.autograd, "grad", self._begin_grad, self._end_grad)
        self._scaling.patch(self._patches)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._patches.undo()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tracer.path.on_enter = self._tracer.path.on_leave = None
        self._tracer.guarded(self._finish)
        if isinstance(exc_info[1], Exception) and speaks_of_values(exc_info[1]):
            # The program itself has looked at values and given up.
            self._tracer.guarded(self._ledger.reached_by_error, "output", exc_info[1])

    # Forward.

    def _meet(self, module: nn.Module, prefix: str) -> None:
        """A module that was not seen before: its state is looked at, and its parts get their names."""
        self._tracer.path.name_modules(module, prefix)
        if module is self.model and self._health is not None:
            self._health.attach(dict(module.named_modules()))
        for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            self._declare(kind, ((f"{prefix}.{name}" if prefix else name, tensor) for name, tensor in named))

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
        declare_inputs(self._tracer, module, args, kwargs)
        if is_model:
            self._is_entered = True
            self._tracer.places.note_driver()
            if torch.is_grad_enabled():
                self._begin_part()
            elif not self._has_trained:
                # In evaluation a step is a batch: it ends when what was called is called again.
                if id(module) in self._evaluated:
                    self._evaluated.clear()
                    self._end_step()
                self._evaluated.add(id(module))
            self._tracer.places.is_past_backward = self._tracer.places.has_stepped = False

    def _on_leave(self, module: nn.Module, output: Any) -> None:
        if self._tracer.is_suspicious and self._is_model(module):
            self._tracer.guarded(self._look_at_output, module, output)

    def _look_at_output(self, module: nn.Module, output: Any) -> None:
        self._reached("buffer", module.named_buffers())
        if self._outputs == "never":
            return
        leaves = list(tensors_of(output))
        num_before = len(self._ledger.sinks)
        self._reached("output", [(f"output {number}", leaf) for number, leaf in enumerate(leaves)])
        is_certain = self._outputs == "always" or not torch.is_grad_enabled() or not module.training
        if not is_certain:
            self._abandoned = self._ledger.sinks[num_before:]
            del self._ledger.sinks[num_before:]

    def _is_model(self, module: nn.Module) -> bool:
        """Whether it is the model, or the part of it that is called, or wraps it.

        While the model itself was never called, as where it only holds a generator and a discriminator, any part of it
        that the loop calls is meant.
        """
        called = self._called
        if called is None or module is called or any(part is called for part in module.modules()):
            self._is_called = self._is_called or called is not None
            return called is not None
        return not self._is_called and self._tracer.path.is_part(module)

    def _begin_part(self) -> None:
        """A forward pass for training begins: the next step, or the next part of an accumulated one."""
        if self._evaluated and not self._has_trained and not self._ledger.has_fault:
            # What a trainer evaluates to see whether it works is no step of the training.
            self._evaluated.clear()
            self._ledger.step = 0
        if self._abandoned or self._ledger.read_numbers:
            self.notes["non-finite losses that the loop dropped"] += 1
            self._abandoned = []
            self._ledger.read_numbers.clear()
        if not self._went_backward:
            self._ledger.settle()
            return
        self._went_backward = False
        if self._tracer.is_suspicious and not self._ledger.has_fault:
            # An update by hand is seen here first.
            self._reached("parameter", [(n, t.detach()) for kind, n, t in self.named_tensors() if kind == "parameter"])
        has_gradients = self.has_gradients()
        if self.optimizers and not has_gradients and self._pending:
            self._drop_pending()
        if self.optimizers or has_gradients:
            self._ledger.begin_part()
        else:
            self._end_step()

    def _drop_pending(self) -> None:
        """The loop has reset the gradients without a step: it has dealt with what was wrong."""
        self.notes["non-finite steps that the loop dropped"] += 1
        self._pending.clear()

    # Backward.

    def _begin_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        self._abandoned = []
        self._ledger.read_numbers.clear()
        self._ledger.sent.clear()
        self._ledger.memory.last_received = None
        self._tracer.places.note_driver()
        if not self.optimizers and self._ledger.micro_step and not self.has_gradients():
            # Gradients were reset between the forward and the backward pass.
            self._ledger.count_as_step()
        if self.optimizers and self._pending and not self.has_gradients():
            self._drop_pending()
        self._look_at_bare_leaves()
        roots = self._roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        self._declare_roots(roots)
        if self._tracer.is_watchful:
            num_before = len(self._ledger.sinks)
            self._reached("loss", [("loss", root.detach()) for root in roots])
            fresh = self._ledger.sinks[num_before:]
            if self.optimizers:
                # Certain when the optimizer steps: until then the loop may drop it.
                del self._ledger.sinks[num_before:]
                self._pending += fresh

    def _end_backward(self, *args: Any, **kwargs: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            self._ledger.reached_by_error("gradient", error)
        self._went_backward = self._has_trained = True
        self._tracer.places.is_past_backward = True
        self._ledger.read_numbers.clear()
        self._declare_received(self.parameters())
        if self._tracer.is_suspicious:
            leaves = [*self.parameters(), *leaves_of(self._roots)]
            fresh = self._harmed_gradients({id(leaf): leaf for leaf in leaves}.values())
            harmed = {birth for sink in fresh for birth in sink.births}
            fresh += [sink for sink in self._ledger.sent if not set(sink.births) <= harmed]
            if self.optimizers:
                self._pending += fresh
            else:
                self._ledger.sinks += fresh
        if not self.optimizers and not self._is_entered:
            # Neither modules nor an optimizer tell what is trained, and where a step ends.
            self._bare_leaves = [weakref.ref(leaf) for leaf in leaves_of(self._roots)]
            self._end_step()
        self._roots = []

    def _look_at_bare_leaves(self) -> None:
        """An update by hand of tensors that no module holds is seen before the next backward pass."""
        if self._bare_leaves and self._tracer.is_suspicious:
            leaves = [leaf for reference in self._bare_leaves if (leaf := reference()) is not None]
            self._reached("parameter", [("a tensor of no module", leaf.detach()) for leaf in leaves])

    def _begin_grad(self, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """``torch.autograd.grad`` hands its results back; gradients that are differentiated again are no end."""
        self._abandoned = []
        self._ledger.read_numbers.clear()
        if not kwargs.get("create_graph") and not self.optimizers:
            self._look_at_bare_leaves()
            roots = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            if not self._is_entered:
                self._bare_leaves = [weakref.ref(leaf) for leaf in leaves_of(roots)]
            if all(root.numel() == 1 for root in roots):
                self._declare_roots(roots)
                self._reached("loss", [("loss", root.detach()) for root in roots])

    def _end_grad(self, *args: Any, **kwargs: Any) -> None:
        """Without an optimizer, gradients that are not differentiated again are for an update by hand."""
        if not self.optimizers and not kwargs.get("create_graph"):
            self._went_backward = self._tracer.places.is_past_backward = True
            if not self._is_entered:
                self._end_step()

    # Steps.

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._tracer.guarded(self._meet_optimizer, optimizer)
        if not self._tracer.is_passive:
            self._tracer.guarded(self._look_at_state, optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._tracer.guarded(self._confirm_gradients, optimizer)
            self._tracer.places.phase = "optimizer"
            return None

        def followed() -> Any:
            self._tracer.places.phase = "forward"
            value = closure()
            self._tracer.guarded(self._confirm_gradients, optimizer)
            self._tracer.places.phase = "optimizer"
            return value

        self._tracer.places.phase = "optimizer"
        if len(args) > 1:
            return (args[0], followed, *args[2:]), kwargs
        return args, {**kwargs, "closure": followed}

    def _meet_optimizer(self, optimizer: Optimizer) -> None:
        if all(known is not optimizer for known in self.optimizers):
            if not self.optimizers and not self._ledger.has_fault:
                # What was counted before was counted without it.
                self._ledger.step = self._ledger.micro_step = 0
            self.optimizers.append(optimizer)
            self._main = self._main or optimizer
            self._declare_state(optimizer)

    def _declare_state(self, optimizer: Optimizer) -> None:
        self._declare("optimizer state", optimizer_tensors(self.model, optimizer))

    def _look_at_state(self, optimizer: Optimizer) -> None:
        """State that is new, or that something outside the trace has changed, is declared as in the first step."""
        bad = {id(tensor) for tensor in look_before_step(self._ledger.memory, optimizer)}
        if bad:
            self._declare("optimizer state", [n for n in optimizer_tensors(self.model, optimizer) if id(n[1]) in bad])

    def _confirm_gradients(self, optimizer: Optimizer) -> None:
        """Rule 1: the optimizer takes the gradients as they are."""
        if is_passed_over(optimizer):
            return
        if self._health is not None:
            self._health.before_optimizer_step(optimizer, self.names_of(optimizer))
            if not self._ledger.has_fault:
                self._tracer.guarded(self.updates.before_step, optimizer, self._ledger.step)
        self._ledger.sinks += self._pending
        self._pending.clear()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._declare_received(parameters)
        if self._tracer.is_watchful:
            known = {birth for sink in self._ledger.sinks for birth in sink.births}
            fresh = self._harmed_gradients(parameters)
            self._ledger.by_hand |= {birth for sink in fresh for birth in sink.births} - known
            self._ledger.sinks += fresh

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tracer.places.phase = "forward"
        self._tracer.guarded(self._look_at_step, optimizer)

    def _look_at_step(self, optimizer: Optimizer) -> None:
        if self._tracer.is_suspicious and not is_passed_over(optimizer):
            names = self.names_of(optimizer)
            num_before = len(self._ledger.sinks)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._reached("parameter", [(names.get(id(p), "a parameter"), p.detach()) for p in parameters])
            self._reached(
                "optimizer state",
                [(f"{key} of {names.get(id(p), 'a parameter')}", value) for p, key, value in state_tensors(optimizer)],
            )
            fresh = self._ledger.sinks[num_before:]
            self._tracer.guarded(self.updates.note_spoilt, optimizer, names, fresh, self._ledger.step)
        if self._health is not None:
            if not self._ledger.has_fault:
                names = self.names_of(optimizer)
                self._tracer.guarded(self.updates.after_step, optimizer, names, self._ledger.step)
            self._health.after_optimizer_step(optimizer, self.names_of(optimizer))
        note_step(self._ledger.memory, optimizer)
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
        self._tracer.places.has_stepped = True
        self._tracer.end_step()
        if self._health is not None:
            self._tracer.guarded(self._health.begin_step, self._ledger.step)

    def _finish(self) -> None:
        """The loop has ended: what was not dealt with counts."""
        self._scaling.finish()
        self._look_at_bare_leaves()
        self._ledger.sinks += self._pending
        self._pending.clear()
        if not self._tracer.places.is_past_backward or not (self._is_entered or self._went_backward):
            self._ledger.sinks += list(self._ledger.read_numbers.values()) or self._abandoned
        if self._tracer.is_watchful:
            self._reached("parameter", [(n, t.detach()) for kind, n, t in self.named_tensors() if kind == "parameter"])
            self._reached("buffer", [(name, tensor) for kind, name, tensor in self.named_tensors() if kind == "buffer"])
