"""Numbers as people read them."""

import math

NARROWEST_SPAN = 0.1
"""The least that an axis of accuracies shows: 10 points, so that differences within one seed's noise look small."""


def amount(count: int | float) -> str:
    """Bytes as people read them; "–" where unknown."""
    if not math.isfinite(count):
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def share(value: float, digits: int = 3) -> str:
    """A number between 0 and 1; "–" where unknown."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def points(difference: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{100 * difference:+.1f}" if math.isfinite(difference) else "–"
