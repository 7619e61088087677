"""exploding-gradient-at-init: with fresh weights, the gradient grows on its way back to the first layers.

What it does:
    Takes the norm of the gradient with respect to the output of each layer with weights, from the loss backwards. It
    holds where that rises to more than 500 times that of the last layer, in three layers or more, for every
    initialisation, while the outputs themselves do not grow.

Why it matters:
    The first steps are decided by clipping, or destroy the first layers. Deep networks with batch normalisation and
    no residual connections are the classic case: their outputs have one size and their gradients grow with every
    layer.

Use instead:
    Residual connections around normalised layers.

Known limits:
    Layers are taken in the order in which they ran. Measured on healthy models the rise is at most 7.

References:
    Yang et al. 2019, arXiv:1902.08129.
"""

from nanhunt.findings import Location
from nanhunt.records.init_audit import InitAudit
from nanhunt.rules.init_examples import chain
from nanhunt.rules.nh712_exploding_signal_at_init import rises
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: InitAudit) -> Judgement | None:
    changes = audit.gradient_rises
    if not audit.is_finite or not audit.has_finite_gradients or not rises(changes) or rises(audit.signal_rises):
        return None
    least = min(changes)
    known = [(spread, layer) for layer in audit.weighted if (spread := layer.gradient_norm) is not None]
    spread, largest = max(known, key=lambda pair: pair[0].middle)
    return Judgement(
        f"the gradient grows by {least.factor:.1e} from the loss to {largest.name or largest.kind},"
        f" in {least.num_layers} of {len(audit.weighted)} layers",
        evidence={"rise_min_over_inits": least.factor, "largest_gradient_norm": list(spread)},
        help=("add residual connections, or normalise before each layer",),
        location=Location("backward", module=largest.name),
    )


RULE = Rule("NH714", "exploding-gradient-at-init", "exploding-gradient-at-init", _judge, judges=InitAudit)


FLAGGED = (chain(5.0),)
CLEAN = (chain(1.0), chain(1.5), chain(5.0, forward=5.0))
