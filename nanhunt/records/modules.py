"""What the module tracer saw of a step that went non-finite."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModuleFault:
    """The first module with a non-finite output, or through which a gradient became non-finite.

    Attributes:
        phase: forward or backward.
        modules: Its dotted path; several where hooks cannot tell them apart, as where one tensor feeds several modules;
            none where the gradient came to the model non-finite already.
        num_modules: Module outputs (forward) or gradients between modules (backward) looked at.
        num_nonfinite: How many of them were non-finite.
        from_input: Whether the module was given a non-finite input by the loop.
    """

    phase: Literal["forward", "backward"]
    modules: tuple[str, ...]
    num_modules: int
    num_nonfinite: int
    from_input: bool = False

    @property
    def message(self) -> str:
        """What was seen, as one line."""
        where = " or ".join(name or "the model itself" for name in self.modules)
        if self.phase == "forward":
            given = ", from a non-finite input" if self.from_input else ""
            return f"first non-finite output: {where}{given} ({self.num_nonfinite} of {self.num_modules} outputs)"
        share = f"{self.num_nonfinite} of {self.num_modules} gradients"
        if not self.modules:
            return f"gradient non-finite before it comes to the model: from the loss ({share})"
        return f"gradient first non-finite going back through {where} ({share})"
