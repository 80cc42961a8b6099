"""Colours that colour-blind readers can tell apart, each for light and for dark pages.

Every one has a contrast of at least 3 : 1 against its page (WCAG 1.4.11); the page swaps light for dark by value.
"""

LIGHT = ("#0072B2", "#C4500A", "#00785A", "#9B3F8F", "#8A6800", "#4F5B66", "#7A1F4B", "#332288")
DARK = ("#56B4E9", "#F28E4B", "#3CC79B", "#DD9BD0", "#E8C547", "#B4BEC8", "#F2A7BF", "#A89BFF")
PAGE_LIGHT, PAGE_DARK = "#FFFFFF", "#14181D"

BLUE, ORANGE, GREEN, PURPLE, OCHRE, GREY = LIGHT[:6]
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


def style(place: int) -> tuple[str, str, str]:
    """Colour, dash and marker of the series at this place. Markers differ too, and dashes from the ninth series on."""
    return LIGHT[place % 8], DASHES[(place // 8) % 4], SYMBOLS[place % 8]


def faint(colour: str) -> str:
    """The colour, mostly transparent, for areas."""
    return f"{colour}2E"


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two #RRGGBB colours, 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
