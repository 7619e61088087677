"""What a recipe states of itself: a reproducible failure, its fix, and the findings expected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A failure that anybody can run.

    Attributes:
        title: What fails, in one line.
        expects: Rule codes that replaying the broken form must yield; the fixed form must yield none.
        build: Given whether to build the fixed form: a target (build, optimizer, loss) and a batch on which it fails.
        source: Where the failure was described first.
    """

    title: str
    expects: tuple[str, ...]
    build: Callable[[bool], tuple[Any, Any]]
    source: str
