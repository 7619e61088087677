"""The loss of the detector."""

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logits_BT: Tensor, labels_BT: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Binary focal loss whose value and gradient are finite for every finite logit.

    Mean over B and T of ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    Args:
        logits_BT: Unnormalised scores, (batch, time); any finite real.
        labels_BT: 0 or 1, (batch, time); a value in between weighs the two terms.
        alpha: Weight of the class 1, 0 to 1; the class 0 has ``1 - alpha``.
        gamma: Focusing exponent, dimensionless, >= 0; 0 is weighted cross-entropy.

    Returns:
        Mean loss, (), in nats; float64 for float64 logits, else float32.

    Raises:
        ValueError: If the shapes differ, there is no element, alpha is outside 0 to 1 or gamma is negative.

    Numerics:
        ``log(p)`` and ``log(1 - p)`` are ``logsigmoid``; ``(1 - p)^gamma`` is the exponential of a multiple of it, so
        no probability is formed that could round to 0 or 1, and nothing is clamped. Each term is divided by their
        number before the sum, which would overflow for logits near the largest float. Checked against float64 in
        tests/detector/test_losses.py.

    Source:
        Lin et al. 2017, arXiv:1708.02002, eq. 5.
    """
    if logits_BT.shape != labels_BT.shape or not logits_BT.numel():
        raise ValueError(
            f"logits {tuple(logits_BT.shape)} and labels {tuple(labels_BT.shape)} must agree and hold data"
        )
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha must be 0 to 1 and gamma >= 0, got alpha={alpha}, gamma={gamma}")
    logits = logits_BT.to(torch.promote_types(logits_BT.dtype, torch.float32))
    labels = labels_BT.to(logits.dtype)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = alpha * labels * (gamma * log_q).exp() * -log_p
    negative = (1 - alpha) * (1 - labels) * (gamma * log_p).exp() * -log_q
    return ((positive + negative) / logits.numel()).sum()
