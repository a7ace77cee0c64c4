"""Many measurements as one figure, and figures as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def spread(values: Sequence[float]) -> Row | None:
    """Median, extremes and count; None for no values."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def distribution(values: Sequence[float]) -> Row | None:
    """Percentiles, mean, maximum and count; None for no values."""
    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return {"p50": p50, "p99": p99, "mean": statistics.fmean(values), "max": max(values), "count": len(values)}


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    """Columns are (header, key of the rows): text to the left, numbers to the right, "-" where a row has none."""
    cells = [[header for header, _ in columns]] + [[_cell(row.get(key)) for _, key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [any(isinstance(row.get(key), str) for row in rows) for _, key in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict) and "median" in value:
        return f"{_number(value['median'])} ({_number(value['min'])}..{_number(value['max'])})"
    if isinstance(value, dict):
        return f"{_number(value['p50'])} / {_number(value['p99'])}"
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else value


def _number(value: float) -> str:
    """Three or four digits and more, thousands apart."""
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"
