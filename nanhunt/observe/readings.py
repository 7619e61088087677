"""Numbers that stay on their devices until all of them are read together."""

import math

import torch
from torch import Tensor


class Readings:
    """Scalars on their devices, read together."""

    def __init__(self) -> None:
        self._scalars: list[Tensor] = []

    @property
    def num_scalars(self) -> int:
        """How many there are."""
        return len(self._scalars)

    def add(self, *scalars: Tensor) -> int:
        """Keeps the scalars; their first place in what ``read`` gives."""
        self._scalars += scalars
        return len(self._scalars) - len(scalars)

    def read(self) -> list[float]:
        """All scalars, with one read per device."""
        groups: dict[torch.device, dict[torch.dtype, list[int]]] = {}
        for place, scalar in enumerate(self._scalars):
            groups.setdefault(scalar.device, {}).setdefault(scalar.dtype, []).append(place)
        if len({(scalar.device, scalar.dtype) for scalar in self._scalars}) == 1:
            return torch.stack(self._scalars).tolist()
        values = [math.nan] * len(self._scalars)
        for device, by_dtype in groups.items():
            widest = torch.float32 if device.type == "mps" else torch.float64
            stacks = [torch.stack([self._scalars[place] for place in places]) for places in by_dtype.values()]
            read = torch.cat([stack.to(widest) for stack in stacks]).tolist()
            for place, value in zip((place for places in by_dtype.values() for place in places), read, strict=True):
                values[place] = value
        return values
