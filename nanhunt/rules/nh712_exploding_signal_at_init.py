"""exploding-signal-at-init: with fresh weights, the outputs grow from layer to layer.

What it does:
    Takes the root mean square of the output of each layer with weights. It holds where it rises to more than 500
    times that of the first, in three layers or more, for every initialisation.

Why it matters:
    Losses and gradients begin far too large: softmax and sigmoid are certain and wrong, and half precision overflows
    beyond 65504.

Use instead:
    ``nn.init.kaiming_normal_`` divides by the number of inputs; ``nn.init.normal_`` with its default standard
    deviation of 1 does not. In deep residual networks without normalisation, let the last layer of each branch begin
    small.

Known limits:
    Layers are taken in the order in which they ran. Measured on healthy models (transformers, convolutions with and
    without normalisation, recurrent ones) the rise is at most 7.
"""

from nanhunt.findings import Location
from nanhunt.records.init_audit import DepthChange, Init, InitAudit, LayerAtInit, LayerPass
from nanhunt.rules.nh711_vanishing_signal_at_init import drawn
from nanhunt.rules.registry import Judgement, Rule

LIMIT = 500.0
MIN_LAYERS = 3


def rises(changes: tuple[DepthChange, ...]) -> bool:
    """Whether the rise is beyond the limit for every initialisation."""
    return bool(changes) and all(one.factor > LIMIT and one.num_layers >= MIN_LAYERS for one in changes)


def _judge(audit: InitAudit) -> Judgement | None:
    changes = audit.signal_rises
    if not audit.is_finite or not rises(changes):
        return None
    least = min(changes)
    largest = max(audit.weighted, key=lambda layer: layer.output_rms.middle)
    also = ("the gradient explodes alike on its way back",) if rises(audit.gradient_rises) else ()
    return Judgement(
        f"the output grows by {least.factor:.1e} over {len(audit.weighted)} layers, in {least.num_layers} of them",
        evidence={
            "num_layers": len(audit.weighted),
            "rise_min_over_inits": least.factor,
            "first_output_rms": list(audit.weighted[0].output_rms),
            "largest_output_rms": list(largest.output_rms),
        },
        notes=(*drawn(audit), *also),
        help=("draw the weights by kaiming_normal_, or normalise between the layers",),
        location=Location("forward", module=largest.name),
    )


RULE = Rule("NH712", "exploding-signal-at-init", "exploding-signal-at-init", _judge, judges=InitAudit)


def _chain(gain: float, depth: int = 8) -> InitAudit:
    layers = tuple(
        LayerAtInit(
            f"layers.{number}",
            "Linear",
            (LayerPass(gain**number, gain ** (number + 1), gain ** (number + 1), gain ** (depth - number)),),
            Init((gain / 8,), 0.072, 64),
        )
        for number in range(depth)
    )
    return InitAudit(1, layers)


FLAGGED = (_chain(5.0), _chain(12.0, depth=4))
CLEAN = (_chain(1.0), _chain(1.5), _chain(100.0, depth=2))
