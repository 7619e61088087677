"""Records for the examples of the rules on initialisation."""

from nanhunt.records.init_audit import Init, InitAudit, LayerAtInit, LayerPass


def chain(gain: float, forward: float = 1.0, depth: int = 8) -> InitAudit:
    """Layers whose signal and gradient change by a factor from one to the next.

    Args:
        gain: Factor of the gradient, from the loss to the input.
        forward: Factor of the signal.
        depth: Number of layers.
    """
    layers = tuple(
        LayerAtInit(
            f"layers.{number}",
            "Linear",
            (LayerPass(1.0, forward**number, forward**number, gain ** (depth - number)),),
            Init((0.1,), 0.1, 64),
        )
        for number in range(depth)
    )
    return InitAudit(1, layers)
