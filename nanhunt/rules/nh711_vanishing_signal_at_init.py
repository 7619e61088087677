"""vanishing-signal-at-init: with fresh weights, what tells samples apart is lost on the way through the layers.

What it does:
    Takes, of the output of each layer with weights, the root mean square of what differs between the samples. It
    holds where that falls below 3e-6 of its largest value and stays there, in three layers or more, for every
    initialisation. Where it seems to, the model is run again in float64, so that the rounding beside a large bias is
    not taken for a signal. Where the gradient falls alike on its way back, that is the same cause and is said here.

Why it matters:
    The gradient of a weight is made of the signal before it and the gradient behind it; where each layer takes away a
    factor, every weight gets next to nothing. Training then looks stable because nothing moves. Eight ReLU layers of
    ``xavier`` weights with gain 0.2, 0.1 or 0.01 end at an output of 3e-8, 6e-11 and 6e-20.

Use instead:
    ``nn.init.kaiming_normal_(weight, nonlinearity="relu")`` before ReLU, a normalisation after each layer, or
    residual connections.

Known limits:
    Layers are taken in the order in which they ran, not along the graph: a branch that vanishes beside one that does
    not is missed. Where a model does not run in float64, or even that does not resolve what is left, the fall is given
    as "more than". Recurrent layers are looked at from outside, not over time. Twelve layers of torch's default
    ``Linear`` and ReLU lose a factor of 3e4 and stay below the limit; sixteen do not.

References:
    He et al. 2015, arXiv:1502.01852. The default of ``nn.Linear`` has gain 1/sqrt(3): pytorch#57109.
"""

import math
from dataclasses import replace
from statistics import median

from nanhunt.findings import Location
from nanhunt.records.init_audit import DepthChange, Init, InitAudit, LayerAtInit, LayerPass
from nanhunt.rules.registry import Judgement, Rule

LIMIT = 3e-6
"""Between what twelve default layers of Linear and ReLU lose (3e-5) and eight of xavier gain 0.2 (7e-7)."""
MIN_LAYERS = 3
_SCALED = " x default"


def falls(changes: tuple[DepthChange, ...]) -> bool:
    """Whether the fall is beyond the limit for every initialisation."""
    return bool(changes) and all(one.factor < LIMIT and one.num_layers >= MIN_LAYERS for one in changes)


def drawn(audit: InitAudit) -> tuple[str, ...]:
    """What the weights of most layers look like."""
    inits = [layer.init for layer in audit.weighted if layer.init is not None]
    names = [_family(init) for init in inits]
    common = max(set(names), key=names.count, default="")
    same = [init for init, name in zip(inits, names, strict=True) if name == common]
    if not common:
        return ()
    gain = median(init.gain for init in same)
    return (
        f"{len(same)} of {len(names)} layers look like {_words(common, same)}: gain {gain:.2g}; 1.41 keeps the scale"
        " through ReLU, 1 without",
    )


def _family(init: Init) -> str:
    """The name without the factor, which differs from layer to layer."""
    return _SCALED if init.name.endswith(_SCALED) else init.name


def _words(common: str, inits: list[Init]) -> str:
    ratios = [init.std / init.documented_std for init in inits if init.documented_std]
    return f"{median(ratios):.2g}{_SCALED}" if common == _SCALED and ratios else common


def _judge(audit: InitAudit) -> Judgement | None:
    changes = audit.signal_falls
    if not audit.is_finite or not audit.input_varies or not falls(changes):
        return None
    least, certain = max(changes), max(audit.certain_signal_falls)
    # What is below the rounding is known to be no larger; how large it is, is not known.
    words = f"by {1 / least.factor:.1e}" if least.factor > 0 else "to nothing"
    if certain.factor > least.factor:
        words = f"by more than 1e{math.floor(-math.log10(certain.factor))}"
    first, last = audit.weighted[0], audit.weighted[-1]
    evidence: dict[str, object] = {"num_layers": len(audit.weighted), "fall_min_over_inits": max(least, certain).factor}
    for key, layer in (("first_variation", first), ("last_variation", last)):
        if layer.variation is not None:
            evidence[key] = list(layer.variation)
    if first.gradient_norm is not None:
        evidence["first_gradient_norm"] = list(first.gradient_norm)
    backward = audit.gradient_falls
    also = ("the gradient vanishes alike on its way back",) if audit.has_backward and falls(backward) else ()
    return Judgement(
        f"what differs between samples falls {words} over {len(audit.weighted)} layers, in {least.num_layers} of them",
        evidence=evidence,
        notes=(*drawn(audit), *also),
        help=("draw the weights by kaiming_normal_, or normalise between the layers",),
        location=Location("forward", module=last.name),
    )


RULE = Rule("NH711", "vanishing-signal-at-init", "vanishing-signal-at-init", _judge, judges=InitAudit)


def _chain(gain: float, depth: int = 8, backward: float = 1.0) -> InitAudit:
    """Layers that each change the scale by the same factor."""
    layers = tuple(
        LayerAtInit(
            f"layers.{number}",
            "Linear",
            (LayerPass(gain**number, gain ** (number + 1), gain ** (number + 1), backward ** (depth - number)),),
            Init((gain / 8,), 0.072, 64, "xavier gain 0.1"),
        )
        for number in range(depth)
    )
    return InitAudit(1, layers)


_ZERO = replace(_chain(0.1).layers[-1], init=Init((0.0,), 0.072, 64, "zeros"), passes=(LayerPass(1.0, 0.0, 0.0, 1.0),))
_NORMALISED = replace(_chain(0.01).layers[-1], passes=(LayerPass(1.0, 0.5, 0.5, 1.0),))
_LOST = replace(_chain(0.1).layers[-1], passes=(LayerPass(0.1, 0.1, 0.0, 1.0, rounding=1e-8),))
FLAGGED = (
    _chain(0.1),
    _chain(0.01, backward=0.01),
    InitAudit(1, (*_chain(0.1).layers, _LOST)),
    InitAudit(1, (*_chain(0.1).layers, replace(_LOST, passes=(LayerPass(0.1, 0.1, 0.0, 1.0),)))),
)
CLEAN = (
    _chain(1.0),
    _chain(0.4),
    InitAudit(1, (*_chain(1.0).layers, _ZERO)),
    InitAudit(1, (*_chain(0.01).layers, _NORMALISED)),
    replace(_chain(0.01), input_varies=False),
    _chain(0.001, depth=2),
)
