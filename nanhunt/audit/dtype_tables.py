"""The tables of the dtype audit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanhunt.audit.shadow import name_of
from nanhunt.findings import DataTable
from nanhunt.records.dtype_audit import HALF, DtypeAudit, OpUse

MAX_CHANGES = 16
MAX_ERRORS = 8
_NOTABLE = 1e-6
"""Error of a float32 sum from which on it is listed."""

_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def tables(audit: DtypeAudit) -> list[DataTable]:
    """Where types change, where float64 disagrees most, and how types are promoted."""
    found = [_changes(audit.uses, "forward"), _changes(audit.uses, "backward"), _errors(audit.uses), promotions()]
    return [table for table in found if table.rows]


def _changes(uses: tuple[OpUse, ...], phase: str) -> DataTable:
    in_phase = [use for use in uses if use.place.phase == phase]
    groups = _grouped([use for use in in_phase if any(_bare(dtype) != use.output for dtype in use.inputs)])
    rows = tuple(
        (_change(use), use.count, _share(use.error.max_relative if use.error else None), _name(use), _line(use))
        for use in groups[:MAX_CHANGES]
    )
    note = "error: the largest relative error of an element, against the same operation in float64"
    columns = ("types", "times", "error", "operation", "where")
    return DataTable(f"where dtypes change, {phase}", columns, rows, _more(groups, note))


def _errors(uses: tuple[OpUse, ...]) -> DataTable:
    kept = [use for use in uses if _is_far(use) and all(_bare(dtype) == use.output for dtype in use.inputs)]
    groups = _grouped(kept)
    groups.sort(key=lambda use: -use.error.norm_relative if use.error else 0.0)
    rows = tuple(
        (
            use.output,
            _share(use.error.norm_relative),
            _share(use.error.median_relative),
            _name(use),
            _where(use),
        )
        for use in groups[:MAX_ERRORS]
        if use.error is not None
    )
    title = "furthest from float64"
    note = "by norm: the error's norm over the result's; median: of the relative errors of elements"
    return DataTable(title, ("type", "by norm", "median", "operation", "where"), rows, note)


def _is_far(use: OpUse) -> bool:
    if use.error is None:
        return False
    return use.error.norm_relative > (0.0 if use.output in HALF else _NOTABLE)


def promotions() -> DataTable:
    """What torch makes of two types, asked at run time."""
    half, brain, single = (torch.ones(1, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32))
    number = torch.ones((), dtype=torch.float32)
    pairs: list[tuple[str, Any, Any]] = [
        ("float16 and float32", half, single),
        ("bfloat16 and float16", brain, half),
        ("float16 and a 0-dim float32 tensor", half, number),
        ("float16 and a plain number", half, 1.0),
        ("float16 and int64", half, torch.ones(1, dtype=torch.int64)),
        ("float32 and a 0-dim float64 tensor", single, number.double()),
    ]
    rows = tuple((words, name_of(torch.result_type(one, other))) for words, one, other in pairs)
    return DataTable(
        "how types are promoted",
        ("operands", "result"),
        rows,
        f"in elementwise operations, backward as forward; a matrix product of two types {_mixed_product()}",
    )


def _mixed_product() -> str:
    try:
        product = torch.ones(1, 1, dtype=torch.float16) @ torch.ones(1, 1)
    except RuntimeError:
        return "raises"
    return f"gives {name_of(product.dtype)}"


def _grouped(uses: list[OpUse]) -> list[OpUse]:
    """One for each key, in program order; what stands at one line of many modules is one."""
    groups: dict[Any, OpUse] = {}
    for use in uses:
        place = use.place
        key = place.op, place.source or place.module, place.phase, use.inputs, use.output
        known = groups.get(key)
        if known is None:
            groups[key] = use
            continue
        errors = [one for one in (known.error, use.error) if one is not None]
        error = errors[0].joined(errors[1]) if len(errors) == 2 else errors[0] if errors else None
        groups[key] = replace(known, count=known.count + use.count, error=error)
    return list(groups.values())


def _change(use: OpUse) -> str:
    inputs = " + ".join(_short(dtype) for dtype in use.inputs)
    return f"{inputs} -> {_short(use.output)}"


def _short(dtype: str) -> str:
    return dtype.replace(_bare(dtype), _SHORT.get(_bare(dtype), _bare(dtype)))


def _bare(dtype: str) -> str:
    return dtype.removesuffix(" ()")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _name(use: OpUse) -> str:
    return use.place.op.removeprefix("aten::").strip("_").removeprefix("native_").removesuffix("_backward")


def _line(use: OpUse) -> str:
    source = use.place.source
    return f"{Path(source.file).name}:{source.line}" if source is not None else use.place.module


def _where(use: OpUse) -> str:
    return f"{_line(use)} (backward)" if use.place.phase == "backward" else _line(use)


def _more(groups: list[OpUse], note: str) -> str:
    return f"and {len(groups) - MAX_CHANGES} more; {note}" if len(groups) > MAX_CHANGES else note
