"""What ``audit-init`` measured, as tables of 80 columns."""

from collections.abc import Sequence

from nanhunt.findings import DataTable
from nanhunt.records.init_audit import Across, InitAudit, LayerAtInit

MAX_ROWS = 24
MAX_NAME = 24
RANGING = 100.0
"""Highest over lowest gradient of one layer; healthy models stay below 10."""


def tables_of(audit: InitAudit) -> list[DataTable]:
    """The layers with weights as measured, and those whose weights are not drawn as their class documents."""
    layers = [layer for layer in audit.layers if layer.init is not None]
    if not layers:
        return []
    several = " (lowest / middle / highest)" if audit.num_inits > 1 else ""
    columns = ("layer", "output", "gradient", "gain")
    note = (
        f"output: root mean square over the {audit.num_inits} initialisations{several}; gradient: norm, with respect to"
        f" the output; gain: output over input{_left_out(layers)}{_ranging(layers)}"
    )
    rows = tuple(map(_measured, _thinned(layers)))
    tables = [DataTable("layers with weights, as they ran", columns, rows, note)]
    other = [layer for layer in layers if layer.init is not None and layer.init.name != "default"]
    if other:
        headings = ("layer", "std", "documented", "gain", "documented", "looks like")
        note = (
            "std: of the weights, and as the class documents it; gain: of independent inputs of one size, with these"
            f" and with documented weights{_left_out(other)}"
        )
        rows = tuple(map(_drawn, _thinned(other)))
        tables.append(DataTable("weights not drawn as their class documents", headings, rows, note))
    return tables


def _measured(layer: LayerAtInit) -> tuple[object, ...]:
    spread = layer.output_rms
    values = [spread.middle] if spread.low == spread.high else list(spread)
    return (
        short_name(layer.name or layer.kind),
        " / ".join(f"{value:.2g}" for value in values),
        _number(layer.gradient_norm),
        _number(layer.gain),
    )


def _drawn(layer: LayerAtInit) -> tuple[object, ...]:
    assert layer.init is not None
    init = layer.init
    std, documented = init.documented_std, init.documented_gain
    return (
        short_name(layer.name or layer.kind),
        f"{init.std:.2g}",
        "-" if std is None else f"{std:.2g}",
        f"{init.gain:.2g}",
        "-" if documented is None else f"{documented:.2g}",
        init.name or "-",
    )


def _left_out(layers: Sequence[LayerAtInit]) -> str:
    return f"; {MAX_ROWS} of {len(layers)} layers shown" if len(layers) > MAX_ROWS else ""


def _ranging(layers: Sequence[LayerAtInit]) -> str:
    """The layer whose gradient depends most on the initialisation, where that is beyond chance."""
    spreads = [(layer, layer.gradient_norm) for layer in layers]
    known = [(spread.high / spread.low, layer, spread) for layer, spread in spreads if spread and spread.low > 0]
    factor, layer, spread = max(known, key=lambda one: one[0], default=(1.0, layers[0], None))
    if spread is None or factor < RANGING:
        return ""
    name = layer.name or layer.kind
    return f"; between initialisations the gradient of {name} ranges from {spread.low:.2g} to {spread.high:.2g}"


def _number(value: Across | None) -> str:
    return "-" if value is None else f"{value.middle:.2g}"


def _thinned(layers: Sequence[LayerAtInit]) -> list[LayerAtInit]:
    """The first, the last and some between."""
    if len(layers) <= MAX_ROWS:
        return list(layers)
    places = {round(number * (len(layers) - 1) / (MAX_ROWS - 1)) for number in range(MAX_ROWS)}
    return [layers[place] for place in sorted(places)]


def short_name(name: str) -> str:
    """A dotted path of at most ``MAX_NAME`` characters; what is left out of the middle are dots."""
    if len(name) <= MAX_NAME:
        return name
    head = MAX_NAME // 2 - 2
    return f"{name[:head]}..{name[-(MAX_NAME - head - 2) :]}"
