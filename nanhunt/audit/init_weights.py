"""What the layers of torch document of their initialisation, and what weights look like."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

_UNIFORM = (nn.Linear, nn.modules.conv._ConvNd)
_XAVIER_GAINS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def weight_of(module: nn.Module) -> Tensor | None:
    """The first matrix, kernel or table that a layer owns itself; None for layers of vectors, as normalisations."""
    return next((own for own in module.parameters(recurse=False) if own.dim() >= 2), None)


def fan_in(module: nn.Module, weight: Tensor) -> float:
    """Inputs of each unit; 1 for a table of embeddings, which selects."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 1
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.shape[0] / module.groups * math.prod(weight.shape[2:]) / math.prod(module.stride)
    return math.prod(weight.shape[1:])


def documented_std(module: nn.Module, weight: Tensor) -> float | None:
    """Standard deviation of the weights as the class documents them; None where it documents nothing.

    ``nn.Linear`` and the convolutions draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). That is ``kaiming_uniform_`` with
    ``a=sqrt(5)``, whose gain is 1/sqrt(3), not the sqrt(2) that keeps the scale through ReLU. A transposed convolution
    takes its outputs for ``fan_in``.
    """
    if isinstance(module, _UNIFORM):
        return 1 / math.sqrt(3 * max(math.prod(weight.shape[1:]), 1))
    if isinstance(module, nn.Bilinear):
        return 1 / math.sqrt(3 * module.in1_features)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return 1 / math.sqrt(3 * module.hidden_size)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 1.0
    return _xavier(weight) if isinstance(module, nn.MultiheadAttention) else None


def init_name(
    stds: Sequence[float], weight: Tensor, documented: float | None, inputs: float, *, is_zero: bool = False
) -> str:
    """What the weights look like; empty where like nothing known, or where there are too few to tell.

    Of ``weight`` only the shape counts, for it may have been trained since; ``is_zero`` tells zeros from a constant.
    """
    if not any(stds):
        return "zeros" if is_zero else ""
    # The sample deviation of n draws is itself uncertain by about 1 / sqrt(2 n); three times that is allowed.
    slack = max(0.03, 3 / math.sqrt(2 * weight.numel() * len(stds)))
    std = sum(stds) / len(stds)
    if slack > 0.2:
        return "default" if documented is not None and abs(std / documented - 1) <= slack else ""
    xavier = _xavier(weight)
    known = [("default", documented), ("kaiming for relu", math.sqrt(2 / max(inputs, 1))), ("xavier", xavier)]
    known += [("std 0.02", 0.02), *((f"xavier gain {gain:g}", gain * xavier) for gain in _XAVIER_GAINS)]
    for name, expected in known:
        if expected is not None and abs(std / expected - 1) <= slack:
            return name
    return f"{std / documented:.3g} x default" if documented is not None else ""


def _xavier(weight: Tensor) -> float:
    """Of ``xavier_uniform_`` and ``xavier_normal_`` with gain 1."""
    field = math.prod(weight.shape[2:])
    return math.sqrt(2 / max((weight.shape[0] + weight.shape[1]) * field, 1))
