"""Numbers → text with units, as the page shows them. A number that is not finite is told as such."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Between a number and its unit: no line is broken there.
NBSP = "\N{NO-BREAK SPACE}"

_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count(value: int) -> str:
    """1,234,567."""
    return f"{value:,}"


def size(value: float) -> str:
    """Bytes in the unit that leaves the fewest zeros: 21.3 MB."""
    for factor, unit in _SIZES:
        if value >= factor:
            return f"{value / factor:,.1f}{NBSP}{unit}"
    return f"{value:,.0f}{NBSP}bytes"


def megabytes(value: float) -> str:
    """Bytes in MB, without the unit."""
    return f"{value / 1e6:,.1f}"


def small(value: float) -> str:
    """4.8e-6."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float, digits: int = 2) -> str:
    """0.98 → 98.00 %."""
    return f"{100 * value:.{digits}f}{NBSP}%" if math.isfinite(value) else "not finite"


def seconds(value: float) -> str:
    """7.26 s, 57.5 ms, 4.31 ms."""
    if value >= 1:
        return f"{value:,.2f}{NBSP}s"
    return f"{1e3 * value:.1f}{NBSP}ms" if value >= 0.01 else f"{1e3 * value:.2f}{NBSP}ms"


def by_scale(values: Sequence[float | str]) -> str:
    """One value where all scales have the same."""
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)
