"""Themes whose coloured or muted text is hard to read on our bars and in code get stronger ones.

Knows colours only. Contrast is that of the Web Content Accessibility Guidelines (WCAG 2, 1.4.3):
1 to 21, and 4.5 is what text needs.
"""

from __future__ import annotations

from collections.abc import Mapping

from textual.color import Color

LEAST = 4.5
FENCE = 0.08  # of the foreground in the ground of code, as in app.tcss
GROUNDS = ("background", "surface", "panel")
TEXTS = (
    "foreground", "text-primary", "text-secondary", "text-accent", "text-warning", "text-error",
    "text-success",
)  # fmt: skip
SHARES = {"text-success": 0.8}  # of it is what Textual draws constants in code with


def legible(variables: Mapping[str, str]) -> dict[str, str]:
    """A theme's variables with its colours of text moved towards black or white as far as it
    takes to read them on every ground of ours."""
    background = Color.parse(variables["background"])
    grounds = [Color.parse(variables[name]) for name in GROUNDS]
    grounds.append(background.blend(Color.parse(variables["foreground"]), FENCE))
    strongest = background.get_contrast_text(1.0)
    changed = {}
    for name in TEXTS:
        colour, share = Color.parse(variables[name]), SHARES.get(name, 1.0)
        tries = [colour.blend(strongest, step / 20) for step in range(21)]
        changed[name] = next(
            (made for made in tries if _least_contrast(made, share, grounds) >= LEAST), strongest
        ).hex
    muted = next(
        (p for p in range(60, 100, 5) if _least_contrast(strongest, p / 100, grounds) >= LEAST), 100
    )
    return {**variables, **changed, "text-muted": f"auto {muted}%"}


def _least_contrast(colour: Color, share: float, grounds: list[Color]) -> float:
    """Of text that has a share of `colour` and lets its ground shine through for the rest."""
    return min(_contrast(ground.blend(colour, share), ground) for ground in grounds)


def _contrast(one: Color, other: Color) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Color) -> float:
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in colour.normalized
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
