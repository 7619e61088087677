"""What the module tracer saw of a step that went non-finite."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModuleFault:
    """The first module with a non-finite output, or through which a gradient became non-finite.

    Attributes:
        phase: forward or backward.
        modules: Its dotted path; several where the same tensor feeds several modules and hooks cannot tell them apart.
        num_modules: Module outputs and inputs looked at.
        num_nonfinite: How many of them were non-finite in that phase.
    """

    phase: Literal["forward", "backward"]
    modules: tuple[str, ...]
    num_modules: int
    num_nonfinite: int

    @property
    def message(self) -> str:
        """What was seen, as one line."""
        where = " or ".join(name or "the model itself" for name in self.modules)
        if self.phase == "forward":
            return f"first non-finite output: {where} ({self.num_nonfinite} of {self.num_modules} outputs)"
        share = f"{self.num_nonfinite} of {self.num_modules} gradients"
        return f"gradient first non-finite going back through {where} ({share})"
