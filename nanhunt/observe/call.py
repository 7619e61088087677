"""One operation while it is being judged, and the words for where it stands."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from nanhunt.observe.memory import NO_BIRTHS
from nanhunt.observe.op_info import OpTraits
from nanhunt.observe.source import ForwardSite
from nanhunt.records.ops import SourceLine


class Origin(NamedTuple):
    """What a tensor is that no traced operation wrote."""

    kind: Any = "constant"
    name: str = ""
    module: str = ""
    phase: Any = None


class Here(NamedTuple):
    """Where the running operation stands, in the terms of a record."""

    phase: Any
    module: str
    source: SourceLine | None
    forward_index: int | None = None
    forward_op: str | None = None
    recomputed: bool = False
    own_backward: SourceLine | None = None
    between: Literal["", "before the step", "after the step"] = ""


class Places(Protocol):
    """What knows where an operation stands."""

    def here(self) -> Here:
        """Where the running operation stands."""

    def site(self, index: int, traits: OpTraits) -> ForwardSite:
        """The same, to be worked out when somebody asks."""

    def seen_from(self, site: ForwardSite) -> Here:
        """What is worked out."""


@dataclass(slots=True)
class Call:
    """One operation while it is being judged."""

    index: int
    traits: OpTraits
    args: Any
    kwargs: Any
    inputs: list[Tensor]
    written: list[Tensor]
    taint: frozenset[int] = NO_BIRTHS
    saw_nan: bool = False
    saw_inf: bool = False
