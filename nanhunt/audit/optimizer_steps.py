"""Steps on copies: how weight decay acts, what small gradients do, and which weights move."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.audit.optimizer_copies import NoCopy, copy_of, step
from nanhunt.audit.optimizer_roles import dtype_name, groups_of
from nanhunt.findings import Skip
from nanhunt.records.optimizer_audit import Decay, DryRun, Gradients, ProbeStep, UpdateFacts

BUDGET = 2_000_000_000
"""Bytes of copies; of what is beyond it the first parameters of each group are stepped."""

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GRADIENTS = (0.0, *(10.0**power for power in range(-8, 1)))
_NUM_DECAY_STEPS = 3


def how_decay_acts(optimizer: Optimizer, index: int, rate: float) -> Decay:
    """How the weight decay of a group acts on a weight without gradient, measured in float64.

    Raises:
        NoCopy: If the optimizer cannot be stepped.
    """
    group = optimizer.param_groups[index]
    decay = float(group.get("weight_decay") or 0.0)
    if decay == 0 or not group["params"]:
        return "none"
    if rate <= 0 or not math.isfinite(rate * decay):
        return "unknown"
    (weight,) = _probe(optimizer, index, group["params"][0], [0.0], torch.float64, rate, _NUM_DECAY_STEPS)
    left = float(weight.flatten()[0])
    expected = (1 - rate * decay) ** _NUM_DECAY_STEPS
    is_direct = abs(left - expected) <= 1e-6 * abs(1 - expected) + 4e-16
    return "direct" if is_direct else "through the gradient"


def depends_on_size(optimizer: Optimizer, index: int, rate: float) -> bool:
    """Whether the first update of a group grows with the gradient, as that of SGD does.

    Raises:
        NoCopy: If the optimizer cannot be stepped.
    """
    like = optimizer.param_groups[index]["params"][0]
    small, large = _probe(optimizer, index, like, [1e-2, 1.0], torch.float64, rate or 1e-3)
    moved = [1.0 - float(one.flatten()[0]) for one in (small, large)]
    return abs(moved[1] - moved[0]) > 0.01 * abs(moved[1])


def probe_steps(optimizer: Optimizer, rates: list[float]) -> tuple[list[ProbeStep], list[Skip]]:
    """One step of each group's settings on weights of 1 with gradients from 0 to 1, in each type the group has."""
    found, skips = [], []
    for index, group in enumerate(optimizer.param_groups):
        by_type = Counter(one.dtype for one in group["params"])
        for dtype, number in by_type.items():
            if dtype not in _REAL or not rates[index] > 0:
                continue
            like = next(one for one in group["params"] if one.dtype == dtype)
            values = sorted({float(torch.tensor(value, dtype=dtype)) for value in _GRADIENTS})
            try:
                stepped = _probe(optimizer, index, like, values, dtype, rates[index])
            except NoCopy as error:
                skips.append(Skip(f"small gradients in group {index}", error.message))
                continue
            bad = [value for value, weight in zip(values, stepped, strict=True) if not bool(weight.isfinite().all())]
            eps = group.get("eps")
            eps = float(eps) if isinstance(eps, int | float) else None
            found.append(ProbeStep(index, str(dtype).removeprefix("torch."), eps, number, tuple(bad)))
    return found, skips


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
    updates = [_update(index, dtype, rates[index], seen, sizes[index]) for (index, dtype), seen in buckets.items()]
    return DryRun(source, "the highest planned rate", tuple(updates)), skips


def _within_budget(optimizer: Optimizer) -> tuple[list[tuple[int, nn.Parameter]], list[Skip]]:
    """Parameters to copy; each costs four times its size, with gradient and two moments."""
    chosen, skips, spent, left_out, odd = [], [], 0, 0, Counter[str]()
    seen: set[int] = set()
    for index, parameter in groups_of(optimizer):
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        if not isinstance(parameter, Tensor) or parameter.dtype not in _REAL or _is_special(parameter):
            odd[type(parameter).__name__ if _is_special(parameter) else dtype_name(parameter)] += 1
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
    return is_sharded or parameter.layout is not torch.strided or parameter.is_meta


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
    index: int, dtype: str, rate: float, seen: list[tuple[Tensor, Tensor, Tensor, str]], is_sized: bool
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
    return UpdateFacts(
        *(index, dtype, rate, len(seen), num_elements, num_unchanged, tuple(stuck), num_nonfinite, first, is_sized),
        moved_by=_moved_by([(before, after) for before, after, _, _ in seen]),
    )


def _moved_by(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Norm of the change over that of the weights, in float64."""
    change = math.hypot(*(float(torch.linalg.vector_norm(after.double() - before.double())) for before, after in pairs))
    size = math.hypot(*(float(torch.linalg.vector_norm(before.double())) for before, _ in pairs))
    return change / size if 0 < size < math.inf and math.isfinite(change) else None
