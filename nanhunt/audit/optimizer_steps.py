"""Steps on copies: how weight decay acts, what small gradients do, and which weights move."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from nanhunt.audit.optimizer_copies import NoCopy, copy_of, guarded, step
from nanhunt.audit.optimizer_roles import dtype_name, groups_of
from nanhunt.findings import Skip
from nanhunt.records.optimizer_audit import Decay, DryRun, Gradients, ProbeStep, UpdateFacts

BUDGET = 2_000_000_000
"""Bytes of copies; of what is beyond it the first parameters of each group are stepped."""

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GRADIENTS = (0.0, *(10.0**power for power in range(-8, 1)))
_NUM_DECAY_STEPS = 3
_NUM_REFINEMENTS = 4


def how_decay_acts(optimizer: Optimizer, index: int, rate: float) -> Decay:
    """How the weight decay of a group acts on a weight without gradient, measured in float64.

    Raises:
        NoCopy: If the optimizer cannot be stepped.
    """
    group = optimizer.param_groups[index]
    decay = float(group.get("weight_decay") or 0.0)
    if decay == 0 or not group["params"]:
        return "none"
    if not rate > 0 or not math.isfinite(rate * decay):
        return "unknown"
    (weight,) = _probe(optimizer, index, _like(group["params"]), [0.0], torch.float64, rate, _NUM_DECAY_STEPS)
    left = float(weight.flatten()[0])
    expected = (1 - rate * decay) ** _NUM_DECAY_STEPS
    is_direct = abs(left - expected) <= 1e-6 * abs(1 - expected) + 4e-16
    return "direct" if is_direct else "through the gradient"


def depends_on_size(optimizer: Optimizer, index: int, rate: float) -> bool:
    """Whether the first update of a group grows with the gradient, as that of SGD does.

    Raises:
        NoCopy: If the optimizer cannot be stepped.
    """
    like = _like(optimizer.param_groups[index]["params"])
    small, large = _probe(optimizer, index, like, [1e-2, 1.0], torch.float64, rate or 1e-3)
    moved = [1.0 - float(one.flatten()[0]) for one in (small, large)]
    return abs(moved[1] - moved[0]) > 0.01 * abs(moved[1])


def moves_without_rate(optimizer: Optimizer, index: int) -> bool:
    """Whether a group moves at a rate of 0, as where the optimizer finds a rate by itself.

    Raises:
        NoCopy: If the optimizer cannot be stepped.
    """
    like = _like(optimizer.param_groups[index]["params"])
    (weight,) = _probe(optimizer, index, like, [1.0], torch.float64, 0.0)
    return bool((weight != 1.0).any())


def _like(parameters: list[Tensor]) -> Tensor:
    """A parameter whose device and number of dimensions others may have.

    Raises:
        NoCopy: If there is none with values.
    """
    found = next((one for one in parameters if not (is_lazy(one) or one.is_meta)), None)
    if found is None:
        raise NoCopy("no parameter of the group has values: they are lazy or on the meta device")
    return found


def probe_steps(optimizer: Optimizer, rates: list[float]) -> tuple[list[ProbeStep], list[Skip]]:
    """One step of each group's settings on weights of 1 with gradients from 0 to 1, in each type the group has."""
    found: list[ProbeStep] = []
    skips: list[Skip] = []
    for index, group in enumerate(optimizer.param_groups):
        solid = [one for one in group["params"] if not (is_lazy(one) or one.is_meta)]
        by_type = Counter(one.dtype for one in solid)
        for dtype, number in by_type.items():
            # A group without a rate has an optimizer that finds one by itself.
            if dtype not in _REAL or (group.get("lr") is not None and not 0 < rates[index] < math.inf):
                continue
            like = next(one for one in solid if one.dtype == dtype)
            bad: list[float] = []
            with guarded(f"small gradients in group {index}", skips):
                bad = _bad_gradients(optimizer, index, like, rates[index])
            eps = group.get("eps")
            eps = float(eps) if isinstance(eps, int | float) else None
            found.append(ProbeStep(index, str(dtype).removeprefix("torch."), eps, number, tuple(bad)))
    return found, skips


def _bad_gradients(optimizer: Optimizer, index: int, like: Tensor, rate: float) -> list[float]:
    """Gradients that make a weight of 1 non-finite, in the type of ``like``; the largest one to within a percent."""

    def bad_among(values: Iterable[float]) -> tuple[list[float], list[float]]:
        chosen = sorted({float(torch.tensor(value, dtype=like.dtype)) for value in values})
        stepped = _probe(optimizer, index, like, chosen, like.dtype, rate)
        is_bad = [not bool(weight.isfinite().all()) for weight in stepped]
        return chosen, [value for value, bad in zip(chosen, is_bad, strict=True) if bad]

    values, bad = bad_among(_GRADIENTS)
    for _ in range(_NUM_REFINEMENTS if bad else 0):
        above = next((value for value in values if value > max(bad)), None)
        if above is None:
            break
        # Between 0 and the next one there is no ratio; the type's smallest number will do.
        low = max(max(bad), torch.finfo(like.dtype).smallest_normal)
        values, more = bad_among([max(bad), *(low * (above / low) ** (part / 32) for part in range(33))])
        bad = sorted({*bad, *more})
    return bad


def _probe(
    optimizer: Optimizer,
    index: int,
    like: Tensor,
    gradients: list[float],
    dtype: torch.dtype,
    rate: float,
    num_steps: int = 1,
) -> list[Tensor]:
    """Weights of 1 after steps from a fresh state, one small tensor for each gradient."""
    # As many dimensions as the group's own: some optimizers take matrices only.
    shape = (2,) * min(like.ndim, 4)
    weights = [nn.Parameter(torch.ones(shape, dtype=dtype, device=like.device)) for _ in gradients]
    empty: dict[int, Tensor] = {}
    clone = copy_of(optimizer, empty, with_state=False)
    chosen = clone.param_groups[index]
    chosen["params"] = list(weights)
    clone.param_groups = [chosen]
    for _ in range(num_steps):
        for weight, value in zip(weights, gradients, strict=True):
            weight.grad = torch.full_like(weight, value)
        step(clone, [rate])
    return [weight.detach() for weight in weights]


def dry_run(
    optimizer: Optimizer,
    names: Mapping[int, str],
    gradients: Mapping[int, Tensor | None] | None,
    source: Gradients,
    rates: list[float],
    *,
    with_state: bool,
) -> tuple[DryRun | None, list[Skip]]:
    """One step on copies at these rates.

    Args:
        optimizer: The optimizer; it, its state and its parameters stay as they are.
        names: Names of the parameters, by ``id``.
        gradients: The gradients, by ``id``; None to make some of unit size.
        source: What to call them.
        rates: The rate of each group.
        with_state: Whether to start from the optimizer's state.
    """
    chosen, skips = _within_budget(optimizer)
    if not chosen:
        return None, skips
    copies: dict[int, Tensor] = {}
    for _, parameter in chosen:
        copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        gradient = _made(parameter, optimizer, with_state) if gradients is None else gradients.get(id(parameter))
        copied.grad = gradient.detach().clone() if gradient is not None and parameter.requires_grad else None
        copies[id(parameter)] = copied
    try:
        sizes = {index: depends_on_size(optimizer, index, rates[index]) for index in {index for index, _ in chosen}}
        clone = copy_of(optimizer, copies, with_state=with_state)
        # A step may change the gradients in place.
        kept = {key: one.grad.clone() if one.grad is not None else None for key, one in copies.items()}
        step(clone, rates)
    except NoCopy as error:
        return None, [*skips, Skip("a step on copies", error.message)]
    buckets: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor, str]]] = {}
    for index, parameter in chosen:
        gradient = kept[id(parameter)]
        if gradient is not None:
            entry = (parameter.detach(), copies[id(parameter)].detach(), gradient, names.get(id(parameter), ""))
            buckets.setdefault((index, dtype_name(parameter)), []).append(entry)
    updates = [
        _update(index, dtype, optimizer.param_groups[index], rates[index], seen, sizes[index])
        for (index, dtype), seen in buckets.items()
    ]
    return DryRun(source, "the highest planned rate", tuple(updates)), skips


def _within_budget(optimizer: Optimizer) -> tuple[list[tuple[int, nn.Parameter]], list[Skip]]:
    """Parameters to copy; each costs four times its size, with gradient and two moments."""
    chosen, skips, spent, left_out, odd = [], [], 0, 0, Counter[str]()
    seen: set[int] = set()
    for index, parameter in groups_of(optimizer):
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        if _is_special(parameter) or parameter.dtype not in _REAL:
            odd[_kind(parameter)] += 1
            continue
        size = 4 * parameter.numel() * parameter.element_size()
        if spent + size > BUDGET:
            left_out += 1
            continue
        spent += size
        chosen.append((index, parameter))
    if left_out:
        skips.append(Skip(f"a step on copies of {left_out:,} parameters", "they do not fit into 2 GB of copies"))
    skips += [Skip(f"a step on copies of {number:,} parameters", f"they are {kind}") for kind, number in odd.items()]
    return chosen, skips


def _is_special(parameter: Tensor) -> bool:
    is_sharded = hasattr(parameter, "__tensor_flatten__") or hasattr(parameter, "full_tensor")
    return is_sharded or is_lazy(parameter) or parameter.is_meta or parameter.layout is not torch.strided


def _kind(parameter: Tensor) -> str:
    """What keeps a parameter from being stepped, as one word or two."""
    if is_lazy(parameter) or parameter.is_meta:
        return "lazy" if is_lazy(parameter) else "on the meta device"
    return type(parameter).__name__ if _is_special(parameter) else dtype_name(parameter)


def _made(parameter: Tensor, optimizer: Optimizer, with_state: bool) -> Tensor:
    """A gradient of unit size, or of the size that the second moment says, of either sign."""
    generator = torch.Generator().manual_seed(parameter.numel())
    signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device, parameter.dtype) * 2 - 1
    state: Mapping[str, Any] = optimizer.state.get(parameter, {}) if with_state else {}
    square = state.get("exp_avg_sq")
    if isinstance(square, Tensor) and square.shape == parameter.shape:
        return signs * square.detach().to(parameter.dtype).sqrt()
    return signs


def _update(
    index: int,
    dtype: str,
    group: Mapping[str, Any],
    rate: float,
    seen: list[tuple[Tensor, Tensor, Tensor, str]],
    is_sized: bool,
) -> UpdateFacts:
    num_elements = num_unchanged = num_nonfinite = 0
    stuck, first = [], ""
    for before, after, gradient, name in seen:
        counts = (gradient != 0) & before.isfinite()
        moved = int((counts & (before != after)).sum())
        watched = int(counts.sum())
        broken = int((before.isfinite() & gradient.isfinite() & ~after.isfinite()).sum())
        num_elements, num_unchanged = num_elements + watched, num_unchanged + watched - moved
        num_nonfinite += broken
        first = first or (name if broken else "")
        if watched and not moved:
            stuck.append(name)
    sizes = _sizes([(before, after) for before, after, _, _ in seen], _taken_by_decay(group, rate))
    return UpdateFacts(
        *(index, dtype, rate, len(seen), num_elements, num_unchanged, tuple(stuck), num_nonfinite, first, is_sized),
        change_norm=sizes.change_norm,
        weight_norm=sizes.weight_norm,
        largest_change=sizes.largest_change,
        largest_weight=sizes.largest_weight,
    )


class _Sizes(NamedTuple):
    """Norms of the changes and the weights, and the largest of each."""

    change_norm: float
    weight_norm: float
    largest_change: float
    largest_weight: float


def _taken_by_decay(group: Mapping[str, Any], rate: float) -> float:
    product = rate * float(group.get("weight_decay") or 0.0)
    return product if math.isfinite(product) else 0.0


def _sizes(pairs: list[tuple[Tensor, Tensor]], decayed: float) -> _Sizes:
    """In float64: the squares of large float32 changes overflow where the changes do not."""
    largest_change = largest_weight = 0.0
    changes, weights = [], []
    for one, other in pairs:
        before, after = one.double(), other.double()
        weight = before.abs()
        change = (after - before).abs() - decayed * weight
        changes.append(float(torch.linalg.vector_norm(after - before)))
        weights.append(float(torch.linalg.vector_norm(before)))
        change = change[change.isfinite()]
        largest_change = max(largest_change, float(change.max()) if change.numel() else 0.0)
        largest_weight = max(largest_weight, float(weight.max()) if weight.numel() else 0.0)
    return _Sizes(math.hypot(*changes), math.hypot(*weights), largest_change, largest_weight)
