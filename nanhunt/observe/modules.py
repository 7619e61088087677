"""The module tracer: looks at the tensors that go in and out of modules, and at their gradients, with hooks alone.

NOTE on what it costs, what it changes and what it cannot see.

1. Each tensor is looked at once however many modules it passes, with a sum; only a non-finite sum is confirmed, then
   and there, so that one that overflows is no fault. On a device that would have to be waited for, the smallest and the
   largest value are kept instead and read at a fault.
2. Modules that make nothing non-finite of finite values (``_HANDS_ON``) are not looked at. Gradients are looked at
   where they go in and out of modules that may spoil them, and where they leave and enter the model. So a gradient that
   overflows inside a chain of linear layers is placed in the container around them; a module with weights that are not
   finite is still named.
3. The forward hooks are process-wide and pass over other models. Hooks on the modules themselves would switch off the
   fused evaluation of ``nn.TransformerEncoder``, and full backward hooks would refuse modules that work in place.
4. A fault is judged by following tensors from module to module. What happens between them, in a container's own code,
   hooks do not see; that one tensor there became another is taken from the order alone. A tensor of -inf with a finite
   tensor next in the container's own code counts as a mask that was removed: if something after it is non-finite all
   the same, the container is named. One that becomes NaN there may be a fully masked softmax or a logarithm: both are
   named, the module and the container. A tensor that is used by a module and by the container's own code too is laid to
   the module. What is in neither a tensor, tuple, list, dict nor dataclass is not seen, nor what is compiled.
5. When a checkpointed part is computed again during the backward pass, only its gradients are looked at: its values
   were seen before.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from nanhunt.observe.finite import is_finite
from nanhunt.observe.module_looks import (
    FINITE,
    NAN,
    NEGATIVE_INFINITY,
    Call,
    Look,
    Step,
    Traced,
    know,
    known_look,
    look_at,
    read_back,
    tensors_in,
    worked_upon,
)
from nanhunt.records.modules import ModuleFault

MAX_LOOKS = 50_000
"""Tensors followed at a time; a loop that never steps must not fill the memory."""

_HANDS_ON = frozenset(
    (
        *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    )
)
"""Modules that, with finite weights, make nothing of finite values non-finite, forward or back: what comes out of them
is not looked at."""

_PASSES_ON = _HANDS_ON | frozenset(
    (
        *(nn.Sequential, nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)
"""Modules with finite weights make no finite gradient non-finite: no gradient is looked at for their sake alone."""

_TAKES_MASK = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)
"""Modules to which -inf means "not this one": NaN out of -inf is born in them."""


class ModuleTracer:
    """Follows every module's inputs, outputs and gradients with hooks, for long runs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self._traced: dict[int, Traced] = {}
        self._step = Step()

    def __enter__(self) -> Self:
        self._traced = {id(module): self._described(name, module) for name, module in self._model.named_modules()}
        self._handles = [
            register_module_forward_pre_hook(self._before_forward),
            register_module_forward_hook(self._after_forward, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._step.is_open = False
        for handle in (*self._handles, *self._step.handles):
            handle.remove()
        for handle in self._handles:
            # remove() of torch 2.13 leaves this entry behind, and with it the warning about hooks of all modules.
            torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
        self._handles.clear()

    def begin_step(self) -> None:
        """Forgets what the last step showed."""
        self._step.close()
        self._step = Step()

    def fault(self, *, loss_is_finite: bool = False) -> ModuleFault | None:
        """Where the step first went non-finite.

        Args:
            loss_is_finite: Whether the loss is known to be finite, so that no output can be to blame.

        Returns:
            None if no gradient, and no module output that reaches the end of the forward pass, is non-finite.
        """
        read_back(self._step.looks)
        forward = None if loss_is_finite else _forward_fault(self._step)
        return forward or _backward_fault(self._step) or self._parameter_fault()

    def _described(self, name: str, module: nn.Module) -> Traced:
        # What comes to the model from the loss must be known, whatever the model is.
        is_model = module is self._model
        return Traced(
            module, name, is_model or type(module) not in _PASSES_ON, not is_model and type(module) in _HANDS_ON
        )

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        traced = self._traced.get(id(module))
        # What hands on its input is seen to afterwards.
        if traced is None or traced.hands_on or torch.compiler.is_compiling():
            return
        step = self._step
        if module is self._model:
            # What an error left behind.
            step.stack.clear()
            if len(step.looks) > MAX_LOOKS // 2:
                self.begin_step()
                step = self._step
        call = _begun(step, traced)
        step.stack.append(call)
        if len(step.looks) < MAX_LOOKS:
            step.calls.append(call)
            if args:
                _take(step, call, args)

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        traced = self._traced.get(id(module))
        if traced is None or torch.compiler.is_compiling():
            return
        step = self._step
        if len(step.looks) >= MAX_LOOKS:
            return
        call: Call | None
        if traced.hands_on:
            if len(args) == 1 and type(output) is Tensor and _hand_on(step, traced, args[0], output):
                return
            call = _begun(step, traced)
            call.has_returned = True
            step.calls.append(call)
            _take(step, call, args)
        else:
            call = _returned(step.stack, traced)
            if call is None:
                return
        if kwargs:
            _take_late(step, call, kwargs)
        # Where no gradient goes in, that of the output is the last there is.
        is_watched = traced.acts or not any(look.has_gradient for look in call.inputs)
        for tensor in (output,) if type(output) is Tensor else tensors_in(output):
            look = known_look(step, tensor)
            if look is None:
                look = look_at(step, tensor, call, call.parent, call.is_again)
            elif look.place is call:
                look.place = call.parent
            if look is not None:
                call.outputs.append(look)
                if is_watched:
                    look.watch_gradient(tensor)

    def _parameter_fault(self) -> ModuleFault | None:
        """The owners of non-finite gradients where no gradient between modules was; None if nearly all are."""
        if not any(look.is_watched for look in self._step.looks):
            return None
        gradients = [(n, p.grad) for n, p in self._model.named_parameters() if p.grad is not None]
        bad = [name for name, gradient in gradients if not is_finite(gradient)]
        owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in bad))
        # Clipping spreads one of them to all.
        if not owners or len(owners) > 3 or len(bad) == len(gradients) > 1:
            return None
        return ModuleFault("backward", owners, len(gradients), len(bad))


def _take(step: Step, call: Call, values: Any) -> None:
    """Notes what a call is given."""
    acts = call.traced.acts
    for tensor in tensors_in(values):
        look = known_look(step, tensor)
        if look is None:
            look = look_at(step, tensor, call.parent, call.parent, call.is_again)
        if look is not None:
            if acts and look.has_gradient:
                look.watch_gradient(tensor)
            if not (look.takers and look.takers[-1] is call):
                call.inputs.append(look)
                look.takers.append(call)


def _begun(step: Step, traced: Traced) -> Call:
    """A call that begins, or for a module that hands on what it was given, has ended."""
    if torch._C._current_graph_task_id() != -1:
        return Call(traced, _enclosing(step, traced.name), is_again=True)
    return Call(traced, step.stack[-1] if step.stack else None, is_again=False)


def _hand_on(step: Step, traced: Traced, given: Any, output: Tensor) -> bool:
    """Lets what was seen of the input stand for the output; False if it cannot."""
    if type(given) is not Tensor:
        return False
    look = worked_upon(step, given) if given is output else known_look(step, given)
    if look is None or look.value != FINITE or output.requires_grad is not look.has_gradient:
        return False
    look.givers.append(traced)
    know(step, output, look)
    return True


def _take_late(step: Step, call: Call, values: dict[str, Any]) -> None:
    """Notes what a call was given by name, which is shown only afterwards: what its own modules took it for its own."""
    for tensor in tensors_in(values):
        look = known_look(step, tensor)
        if look is not None and look.maker is call and look.home is call:
            look.maker = look.home = look.place = call.parent
    _take(step, call, values)


def _returned(stack: list[Call], traced: Traced) -> Call | None:
    """The call that ends, off the stack with those that an error ended inside it."""
    for position in range(len(stack) - 1, -1, -1):
        if stack[position].traced is traced:
            call = stack[position]
            del stack[position:]
            call.has_returned = True
            return call
    return None


def _enclosing(step: Step, name: str) -> Call | None:
    """The call around one that is computed again: known by its path, for the outer calls ended long ago."""
    # The end of such a part may be left out, so that its calls do not return.
    while step.stack and not _is_inside(name, step.stack[-1].name):
        step.stack.pop()
    if step.stack:
        return step.stack[-1]
    outer = [call for call in step.calls if _is_inside(name, call.name) and not call.is_again]
    return max(outer, key=lambda call: len(call.name), default=None)


def _is_inside(name: str, container: str) -> bool:
    return name != container and (container == "" or name.startswith(f"{container}."))


def _forward_fault(step: Step) -> ModuleFault | None:
    made: dict[Call | None, list[Look]] = defaultdict(list)
    homes: dict[Call | None, list[Look]] = defaultdict(list)
    for look in step.looks:
        made[look.maker].append(look)
        homes[look.home].append(look)
    reaches: dict[Look, int] = {}
    for look in reversed(step.looks):
        if look.value:
            reaches[look] = _reach(look, made, reaches)
    births = [look for look in reaches if reaches[look] and not _is_explained(look, homes)]
    if not births:
        return _handed_fault(step, step.looks)
    # Those that surely reach the end come before those that may have been removed on the way.
    first = min(births, key=lambda look: (-reaches[look], look.number))
    if first.maker is not None:
        handed = _handed_fault(step, [*homes[first.maker], *first.maker.inputs])
        if handed:
            return handed
    names, from_input = _makers(first, made, is_sure=reaches[first] == 2)
    return ModuleFault("forward", names, *_count(step), from_input)


def _handed_fault(step: Step, looks: Sequence[Look]) -> ModuleFault | None:
    """The first module whose output was not looked at and is not finite as was thought, for its weights are not."""
    givers = dict.fromkeys(giver for look in looks for giver in look.givers)
    names = [giver.name for giver in givers if not giver.has_finite_state()]
    return ModuleFault("forward", (names[0],), *_count(step)) if names else None


def _count(step: Step) -> tuple[int, int]:
    """Outputs of modules, and how many of them are non-finite."""
    outputs = [output for call in step.calls if not call.is_again for output in call.outputs]
    return len(outputs), sum(bool(look.value) for look in outputs)


def _reach(look: Look, made: Mapping[Call | None, list[Look]], reaches: Mapping[Look, int]) -> int:
    """Whether a non-finite tensor reaches the end: 0 no, 1 perhaps, 2 yes."""
    takers = [call for call in look.innermost_takers() if look not in call.outputs]
    if look.place is None and not takers:
        # What the loop made is no output of the model unless a module hands it back.
        return 2 if look.maker is not None or look.takers else 0
    best = 0
    for call in takers:
        if look.value == NEGATIVE_INFINITY and isinstance(call.traced.module, _TAKES_MASK):
            continue
        through = [reaches.get(output, 0) for output in call.outputs]
        best = max([best, *through] if call.has_returned else [2])
    if look.place is None or best == 2:
        return best
    later = [other for other in made[look.place] if other.number > look.number]
    by_code = max((reaches.get(other, 0) for other in later), default=0 if look.place.has_returned else 2)
    was_removed = bool(takers) or (later and later[0].value == FINITE and look.value != NAN)
    return max(best, min(by_code, 1) if was_removed else by_code)


def _is_explained(look: Look, homes: Mapping[Call | None, list[Look]]) -> bool:
    """Whether what made the tensor had something non-finite to make it from."""
    maker = look.maker
    if maker is None:
        return False
    sources = [other for other in homes[maker] if other.number < look.number]
    sources += [other for other in maker.inputs if other is not look]
    worst = max((other.value for other in sources if _leaks(other, maker)), default=FINITE)
    if look.value == NAN and worst == NEGATIVE_INFINITY and isinstance(maker.traced.module, _TAKES_MASK):
        return False
    return worst != FINITE


def _leaks(look: Look, maker: Call) -> bool:
    """Whether a tensor was used by the maker's own code, or by modules in it that did not make it finite."""
    takers = look.innermost_takers()
    return not takers or any(call is maker or call.is_bad for call in takers)


def _makers(look: Look, made: Mapping[Call | None, list[Look]], *, is_sure: bool) -> tuple[tuple[str, ...], bool]:
    """Names of the modules that may have made the tensor, and whether they were given it by the loop."""
    if look.maker is None:
        takers = look.innermost_takers()
        return tuple(dict.fromkeys(call.name for call in takers if call.is_bad))[:1], True
    if look.value == NEGATIVE_INFINITY and look.place is not None and not look.innermost_takers():
        later = [other for other in made[look.place] if other.number > look.number]
        if not is_sure:
            return (look.place.name,), False
        if later and later[0].value == NAN:
            return tuple(dict.fromkeys((look.maker.name, look.place.name))), False
    return (look.maker.name,), False


def _backward_fault(step: Step) -> ModuleFault | None:
    bad = [look for look in step.gradients if look.gradient]
    if not bad:
        return None
    first = bad[0]
    acting = [call for call in first.takers if call.traced.acts and _passed_gradient(call)]
    # A part that is computed again has its gradients there, and the first time shows none.
    blamed = [call for call in acting if not any(other.is_inside(call) for other in acting)]
    suspects = [call.traced for call in blamed]
    if not suspects:
        others = [*first.givers, *(call.traced for call in first.innermost_takers())]
        suspects = [traced for traced in others if not traced.acts and not traced.has_finite_state()]
    if not suspects and first.place is not None:
        suspects = [first.place.traced]
    names = [traced.name for traced in suspects]
    num_seen = sum(look.gradient is not None for look in step.looks)
    return ModuleFault("backward", tuple(dict.fromkeys(names)), num_seen, len(bad))


def _passed_gradient(call: Call) -> bool:
    return call.has_returned and not (call.outputs and all(look.gradient is None for look in call.outputs))
