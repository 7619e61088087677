"""The state of an optimizer, as it stands or as a file has it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from nanhunt.audit.optimizer_roles import dtype_name, groups_of, rate_of
from nanhunt.records.optimizer_audit import (
    Decay,
    GroupFacts,
    SettingsComparison,
    StateFacts,
    StoredState,
    StoredWeights,
)

# Per-element state of torch's optimizers and of those that follow their names.
_PER_ELEMENT = frozenset(
    (
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "sum",
        "acc_delta",
        "exp_inf",
        "prev",
        "step_size",
    )
)
# Sums and means of squares or sizes, with the setting by which one knows the optimizers of torch that keep them under
# this name: others may call anything "sum".
_SECOND_MOMENTS = {
    "exp_avg_sq": "",
    "max_exp_avg_sq": "",
    "exp_inf": "betas",
    "square_avg": "",
    "acc_delta": "rho",
    "sum": "initial_accumulator_value",
    "row_var": "beta2_decay",
    "col_var": "beta2_decay",
    "variance": "beta2_decay",
}
_KEEPING = ("betas", "alpha", "rho", "etas", "lr_decay")

Expected = Callable[[Any], tuple[tuple[int, ...], str] | None]


class Layout(NamedTuple):
    """How the entries of a state dict belong to parameters.

    Attributes:
        names: Names of parameters by their number in the groups, as far as they are known.
        expected: Shape and type of the parameter of a number; None where they are not known.
    """

    names: Mapping[Any, str]
    expected: Mapping[Any, tuple[tuple[int, ...], str]]


def layout_of(optimizer: Optimizer, names: Mapping[int, str]) -> Layout:
    """The layout that a state dict of this optimizer has."""
    numbered: dict[int, Tensor] = {}
    for number, (_, parameter) in enumerate(groups_of(optimizer)):
        numbered[number] = parameter
    titles = {number: names.get(id(one), f"parameter {number}") for number, one in numbered.items()}
    return Layout(
        titles, {number: (tuple(one.shape), dtype_name(one)) for number, one in numbered.items() if not is_lazy(one)}
    )


def state_in_file(
    state_dict: Mapping[str, Any],
    *,
    layout: Layout | None,
    step: int | None,
    with_gradient: Sequence[str] = (),
) -> StoredState:
    """What is in the state dict of a file.

    Args:
        state_dict: The state dict; empty where the file has none.
        layout: What its numbers mean; None without a target.
        step: Steps that the file says were taken.
        with_gradient: Names of parameters that are known to get a gradient.
    """
    groups = [group for group in state_dict.get("param_groups", ()) if isinstance(group, Mapping)]
    numbers = [number for group in groups for number in group.get("params", ())]
    raw = state_dict.get("state", {})
    state = raw if isinstance(raw, Mapping) else {}
    fits = layout is not None and len(layout.names) == len(set(numbers))
    names = {number: _title(number, place, layout if fits else None) for place, number in enumerate(numbers)}
    expected = {number: layout.expected.get(place) for place, number in enumerate(numbers)} if layout and fits else {}
    known = [number for number in numbers if state.get(number)]
    without = [names[number] for number in numbers if not state.get(number) and names[number] in with_gradient]
    return StoredState(
        origin="the file",
        entries=tuple(_entries(state, lambda number: names.get(number, f"parameter {number}"), expected.get, groups)),
        num_parameters=len(numbers),
        num_with_state=len(known),
        unknown=tuple(f"parameter {number}" for number in state if number not in names),
        without=tuple(without) if known else (),
        num_expected=len(layout.names) if layout is not None else None,
        step=step,
        steps=_steps(state),
        keeps_state=_keeps_state(groups) if groups else None,
    )


def state_as_it_stands(
    optimizer: Optimizer, names: Mapping[int, str], with_gradient: Sequence[str] = ()
) -> StoredState | None:
    """The state that an optimizer holds; None if it holds none."""
    if not optimizer.state:
        return None
    own = {id(parameter) for _, parameter in groups_of(optimizer)}
    titles = {number: names.get(number, "a tensor of no module") for number in own}
    state = {id(key): value for key, value in optimizer.state.items() if isinstance(key, Tensor)}
    tensors = {id(parameter): parameter for _, parameter in groups_of(optimizer)}
    known = [number for number in own if state.get(number)]
    without = [titles[number] for number in own if not state.get(number) and titles[number] in with_gradient]

    def expected(number: Any) -> tuple[tuple[int, ...], str] | None:
        one = tensors.get(number)
        return (tuple(one.shape), dtype_name(one)) if one is not None and not is_lazy(one) else None

    return StoredState(
        origin="the optimizer",
        entries=tuple(
            _entries(state, lambda number: titles.get(number, "a tensor in no group"), expected, optimizer.param_groups)
        ),
        num_parameters=len(own),
        num_with_state=len(known),
        unknown=tuple(names.get(number, "a tensor of no module") for number in state if number not in own),
        without=tuple(sorted(without)) if known else (),
        steps=_steps(state),
        keeps_state=_keeps_state(optimizer.param_groups),
    )


def is_usable(state: StoredState) -> bool:
    """Whether a step may start from it: everything finite, of the right shape and nowhere negative."""
    return all(
        not (one.num_nan or one.num_inf or (one.is_second_moment and one.num_negative))
        and one.expected_shape in (None, one.shape)
        for one in state.entries
    )


def _title(number: Any, place: int, layout: Layout | None) -> str:
    if isinstance(number, str):
        return number
    return layout.names.get(place, f"parameter {number}") if layout is not None else f"parameter {number}"


def _entries(
    state: Mapping[Any, Any], title: Callable[[Any], str], expected: Expected, groups: Sequence[Mapping[str, Any]]
) -> Iterator[StateFacts]:
    settings = {name for group in groups for name in group}
    squares = {key for key, setting in _SECOND_MOMENTS.items() if not setting or setting in settings}
    for number, held in state.items():
        for key, value in held.items() if isinstance(held, Mapping) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
                yield _facts(title(number), str(key), value, expected(number), key in squares)


def _facts(
    parameter: str, key: str, value: Tensor, expected: tuple[tuple[int, ...], str] | None, is_second: bool
) -> StateFacts:
    must_agree = expected is not None and key in _PER_ELEMENT
    plain = value.detach() if value.layout is torch.strided else value.detach().coalesce().values()
    num_nan, num_inf = int(plain.isnan().sum()), int(plain.isinf().sum())
    negative = plain < 0
    num_negative = int(negative.sum())
    first: tuple[int, ...] = ()
    if num_nan or num_inf or (is_second and num_negative):
        wrong = ~plain.isfinite()
        wrong = (wrong | negative) if is_second else wrong
        first = tuple(int(place) for place in wrong.nonzero()[0])
    return StateFacts(
        *(parameter, key, dtype_name(value), tuple(value.shape)),
        expected_dtype=expected[1] if must_agree and expected is not None else "",
        expected_shape=expected[0] if must_agree and expected is not None else None,
        num_elements=value.numel(),
        num_nan=num_nan,
        num_inf=num_inf,
        num_negative=num_negative,
        first_index=first,
        is_second_moment=is_second,
    )


def _steps(state: Mapping[Any, Any]) -> tuple[float, float] | None:
    counts = [float(held["step"]) for held in state.values() if isinstance(held, Mapping) and _is_number(held)]
    counts = [count for count in counts if math.isfinite(count)]
    return (min(counts), max(counts)) if counts else None


def _is_number(held: Mapping[str, Any]) -> bool:
    value = held.get("step")
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _keeps_state(groups: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether an optimizer with these settings keeps state; None where its settings do not tell."""
    if any(key in group for group in groups for key in _KEEPING):
        return True
    if all("momentum" in group for group in groups):
        return any(group["momentum"] != 0 for group in groups)
    return None


def settings_of(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a group by name, but for the rate and the decay; a pair gives two."""
    found: dict[str, float] = {}
    for key, value in group.items():
        if key in ("params", "lr", "initial_lr", "weight_decay"):
            continue
        values = list(value) if isinstance(value, tuple | list) else [value]
        for place, one in enumerate(values):
            if isinstance(one, Tensor) and one.numel() == 1:
                one = float(one)
            if isinstance(one, int | float) and not isinstance(one, bool):
                found[key if len(values) == 1 else f"{key}.{place}"] = float(one)
    return found


def compared(state_dict: Mapping[str, Any], current: Optimizer) -> SettingsComparison:
    """Settings of the file against the target's optimizer; the rate is the schedule's business."""
    groups = [group for group in state_dict.get("param_groups", ()) if isinstance(group, Mapping)]
    return SettingsComparison(tuple(_differing(groups, current)))


def _differing(groups: Sequence[Mapping[str, Any]], current: Optimizer) -> Iterator[tuple[str, object, object]]:
    if len(groups) != len(current.param_groups):
        yield "number of groups", len(groups), len(current.param_groups)
        return
    for index, (there, here) in enumerate(zip(groups, current.param_groups, strict=True)):
        both = {**_compared(here), **_compared(there)}
        for key in both:
            mine, theirs = _compared(here).get(key), _compared(there).get(key)
            if mine is not None and theirs is not None and mine != theirs:
                yield f"{key} of group {index}", theirs, mine


def _compared(group: Mapping[str, Any]) -> dict[str, object]:
    flags = {key: group[key] for key in ("amsgrad", "maximize", "nesterov", "decoupled_weight_decay") if key in group}
    rates = {"initial_lr": float(group["initial_lr"])} if "initial_lr" in group else {}
    decay = {"weight_decay": float(group["weight_decay"])} if group.get("weight_decay") is not None else {}
    return {**settings_of(group), **flags, **rates, **decay}


def stored_weights(weights: Mapping[str, Tensor]) -> StoredWeights:
    """Which weights of a file are non-finite."""
    kinds = {name: value for name, value in weights.items() if value.is_floating_point() or value.is_complex()}
    return StoredWeights(len(weights), tuple(name for name, value in kinds.items() if not bool(value.isfinite().all())))


def groups_in_file(state_dict: Mapping[str, Any]) -> tuple[GroupFacts, ...]:
    """The numbers of the groups in a state dict."""
    found = []
    for index, group in enumerate(state_dict.get("param_groups", ())):
        rate, decay = rate_of(group), float(group.get("weight_decay") or 0.0)
        numbers: dict[str, Any] = {
            "num_parameters": len(group.get("params", ())),
            "peak_lr": rate if group.get("lr") is not None else 0.0,
        }
        acts: Decay = "unknown" if decay else "none"
        found.append(
            GroupFacts(
                index, rate if group.get("lr") is not None else None, decay, settings_of(group), decay=acts, **numbers
            )
        )
    return tuple(found)


def steps_text(state: StoredState) -> str:
    """How many steps the state has seen, to be put behind something."""
    if state.steps is None:
        return ""
    low, high = state.steps
    return f", step {high:,.0f}" if low == high else f", steps {low:,.0f} to {high:,.0f}"
