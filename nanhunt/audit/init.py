"""``audit-init``: how large values and gradients are, layer by layer, before anything is trained."""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from nanhunt.audit.init_keeper import Keeper
from nanhunt.audit.init_passes import Loss, Pass, in_float64, kept_rng, names_of, projected, run_pass
from nanhunt.audit.init_table import tables_of
from nanhunt.audit.init_weights import documented_std, fan_in, init_name, weight_of
from nanhunt.audit.report import report_of
from nanhunt.audit.subject import Subject
from nanhunt.errors import NanhuntError, TargetError
from nanhunt.findings import Report, Skip
from nanhunt.numerics import count
from nanhunt.observe.holders import unwrapped
from nanhunt.observe.values import tensors_of
from nanhunt.records.init_audit import ActivationAtInit, Init, InitAudit, LayerAtInit, ParameterAtInit
from nanhunt.rules.nh711_vanishing_signal_at_init import falls
from nanhunt.targets import Target, find_target

NUM_INITS = 3

Progress = Callable[[str], None]


def audit_init(
    target_or_model: str | nn.Module | Any,
    batch: Any | None = None,
    loss: Loss | None = None,
    *,
    num_inits: int = NUM_INITS,
    seed: int = 0,
    progress: Progress = lambda what: None,
) -> Report:
    """The scale of values and gradients, layer by layer, on fresh weights.

    Neither the model nor the random generators of the program are changed. Hooks of the model run on its copy, too.

    Args:
        target_or_model: A target, its name, or a function or class that builds the model, which is then built with
            ``num_inits`` seeds; or a model, whose weights are taken as they are.
        batch: What the loss is given; None for the target's control batch.
        loss: Gives a tensor for the model and the batch; None for the target's, or else the model is called with the
            batch, and the ``loss`` it returns or a random projection of its outputs stands in.
        num_inits: Seeds to build with.
        seed: The first of them.
        progress: Called with what is being run.

    Raises:
        TargetError: If the target cannot be found or built.
        NanhuntError: If there is no batch, or the model fails on it.
    """
    if isinstance(target_or_model, nn.Module):
        return _audit_module(target_or_model, batch, loss, seed, progress)
    target = _target(target_or_model)
    with kept_rng():
        given = batch if batch is not None else target.control_batch(seed)
        seeds = range(seed, seed + num_inits)
        return _audit(target.name, target.build, seeds, given, _loss_of(target, loss), progress)


def audit_subject(subject: Subject, progress: Progress) -> Report:
    """The audit of what a command line names; stored weights are left out, for they are not fresh.

    Raises:
        TargetError: If there is no target.
        NanhuntError: If there is no batch, or the model fails on it.
    """
    target = subject.target
    if target is None:
        raise TargetError(f"no target to build the model of {subject.name}", help="give --target module:attribute")
    with kept_rng():
        seeds = range(subject.seed, subject.seed + NUM_INITS)
        return _audit(subject.name, target.build, seeds, subject.batch(), _loss_of(target, None), progress)


def _target(given: Any) -> Target:
    if isinstance(given, str):
        return find_target(given)
    return given if isinstance(given, Target) else Target(getattr(given, "__name__", type(given).__name__), given)


def _loss_of(target: Target, loss: Loss | None) -> Loss:
    if loss is not None:
        return loss
    return target.loss if target.has_loss else projected


def _audit_module(model: nn.Module, batch: Any, loss: Loss | None, seed: int, progress: Progress) -> Report:
    def copied(seed: int) -> nn.Module:
        keeper.ignore()
        try:
            its_copy = copy.deepcopy(unwrapped(model)).train()
        # A model of others may refuse in any way.
        except Exception as error:
            raise NanhuntError(
                f"the model cannot be copied: {error}", help="give a function that builds it instead"
            ) from error
        keeper.watch(its_copy)
        return its_copy

    with kept_rng(), Keeper(model) as keeper:
        return _audit(type(model).__name__, copied, [seed], batch, loss or projected, progress)


def _audit(
    name: str, build: Callable[[int], nn.Module], seeds: Sequence[int], batch: Any, loss: Loss, progress: Progress
) -> Report:
    started = time.perf_counter()
    if batch is None:
        raise NanhuntError(
            f"no batch to run {name} on", help="give a capture, or a target with control_batch(seed), or pass batch="
        )
    passes: list[Pass] = []
    for number, seed in enumerate(seeds):
        progress(f"forward and backward, initialisation {number + 1} of {len(seeds)}")
        model = build(seed)
        passes.append(run_pass(model, batch, loss, seed))
    audit = _record(model, passes)
    if falls(audit.signal_falls):
        progress("the same in float64")
        passes = [in_float64(one, build, batch, loss, seed) for one, seed in zip(passes, seeds, strict=True)]
        audit = _record(model, passes)
    return report_of(
        f"audit-init of {name}",
        [audit],
        facts=_facts(audit, list(seeds), batch, loss),
        tables=tables_of(audit),
        skips=_skips(audit, list(seeds)),
        seconds=time.perf_counter() - started,
    )


def _record(model: nn.Module, passes: Sequence[Pass]) -> InitAudit:
    modules = dict(model.named_modules())
    names = names_of(passes)
    layers = tuple(_layer(modules[name], name, model, passes) for name in names)
    keys = [key for key in passes[0].activations if all(key in one.activations for one in passes)]
    outputs = [one.output for one in passes if one.output is not None]
    return InitAudit(
        num_inits=len(passes),
        layers=layers,
        activations=tuple(ActivationAtInit(*key, tuple(one.activations[key] for one in passes)) for key in keys),
        parameters=tuple(_parameter(name, model, passes) for name in passes[0].gradient_norms),
        outputs=tuple(outputs) if len(outputs) == len(passes) else (),
        input_varies=all(one.input_varies for one in passes),
        has_backward=all(one.has_backward for one in passes),
    )


def _layer(module: nn.Module, name: str, model: nn.Module, passes: Sequence[Pass]) -> LayerAtInit:
    kind, seen = type(module).__name__, tuple(one.layers[name] for one in passes)
    weight = weight_of(module)
    if weight is None:
        return LayerAtInit(name, kind, seen)
    keys = {id(own): key for key, own in model.named_parameters()}
    stds = tuple(one.stds[keys[id(weight)]] for one in passes)
    documented, inputs = documented_std(module, weight), fan_in(module, weight)
    is_zero = all(keys[id(weight)] in one.zero for one in passes)
    looks_like = init_name(stds, weight, documented, inputs, is_zero=is_zero)
    return LayerAtInit(name, kind, seen, Init(stds, documented, inputs, looks_like))


def _parameter(name: str, model: nn.Module, passes: Sequence[Pass]) -> ParameterAtInit:
    return ParameterAtInit(
        name=name,
        shape=tuple(model.get_parameter(name).shape),
        gradient_norms=tuple(one.gradient_norms[name] for one in passes),
        num_nonfinite=max(one.num_nonfinite[name] for one in passes),
        is_zero=all(name in one.zero for one in passes),
        still_blocked=all(name in one.blocked for one in passes),
        has_equal_units=all(name in one.equal for one in passes),
    )


def _facts(audit: InitAudit, seeds: list[int], batch: Any, loss: Loss) -> list[tuple[str, str]]:
    shapes = [list(tensor.shape) for tensor in tensors_of(batch) if isinstance(tensor, torch.Tensor)]
    numbers = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    stand_in = "the model's own, or a random projection of its outputs" if loss is projected else "as it is trained"
    return [
        ("initialisations", f"{audit.num_inits}, {numbers}"),
        ("batch", ", ".join(map(str, shapes[:4]))),
        ("loss", stand_in),
        ("layers", f"{count(len(audit.layers), 'layer')}, {len(audit.weighted)} with weights"),
    ]


def _skips(audit: InitAudit, seeds: list[int]) -> list[Skip]:
    skips = []
    if not audit.has_backward:
        skips.append(Skip("gradients", "the loss does not depend on the parameters"))
    if not audit.input_varies:
        skips.append(Skip("whether the output depends on the input", "the samples of the batch are all the same"))
    if len(seeds) == 1:
        skips.append(Skip("other initialisations", "a model was given, not what builds it"))
    return skips
