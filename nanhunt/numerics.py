"""Limits of floating-point types, without torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FloatLimits:
    """Range and precision of a floating-point type.

    Attributes:
        max: Largest finite value.
        tiny: Smallest normal value.
        smallest_subnormal: Smallest positive value.
        eps: Spacing of the numbers just above 1.
    """

    max: float
    tiny: float
    smallest_subnormal: float
    eps: float


# IEEE 754-2019 (binary16, binary32, binary64); bfloat16 has the exponent of binary32 and 8 bits of precision.
LIMITS: dict[str, FloatLimits] = {
    "float16": FloatLimits(65504.0, 2.0**-14, 2.0**-24, 2.0**-10),
    "bfloat16": FloatLimits((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7),
    "float32": FloatLimits((2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23),
    "float64": FloatLimits((2 - 2.0**-52) * 2.0**1023, 2.0**-1022, 2.0**-1074, 2.0**-52),
}


def ulp(value: float, dtype: str) -> float:
    """Spacing of the numbers of ``dtype`` at ``value``, away from zero; NaN beyond its range.

    Raises:
        KeyError: If ``dtype`` is not in ``LIMITS``.
    """
    limits = LIMITS[dtype]
    if not abs(value) <= limits.max:
        return math.nan
    if abs(value) < limits.tiny:
        return limits.smallest_subnormal
    exponent = math.frexp(abs(value))[1] - 1
    return limits.eps * 2.0**exponent


def count(number: int, noun: str, plural: str = "") -> str:
    """``1 gradient``, ``61,440 logits``, ``2 matrices``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
