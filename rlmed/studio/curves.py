"""The report's curves for pages whose policy allows no inline style."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from html import escape, unescape

from markupsafe import Markup

from rlmed.report.plots import Plot, draw_metrics

_LOCK = threading.Lock()
"""matplotlib's settings belong to the process."""
_STYLE = re.compile(r' style="([^"]*)"')
_DEFINED = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)


def draw_plots(draw: Callable[[], list[Plot]]) -> list[Plot]:
    """Call `draw` alone in the process; return its plots with attributes in place of styles."""
    with _LOCK:
        plots = draw()
    return [dataclasses.replace(plot, svg=plain_svg(plot.svg, plot.title)) for plot in plots]


def warm_up() -> None:
    """Draw once: the first curve waits seconds for matplotlib's fonts, and no page shall."""
    draw_plots(lambda: draw_metrics([{"step": step, "loss": 1.0} for step in (1, 2)]))


def plain_svg(svg: Markup, label: str) -> Markup:
    """Return an SVG element without style attributes or sheets, named for those who do not see it.

    Example:
        >>> plain_svg(Markup('<svg role="img"><path style="fill: none; stroke: var(--muted)"/></svg>'), "Loss")
        Markup('<svg role="img" aria-label="Loss"><path fill="none" stroke="var(--muted)"/></svg>')
    """
    text = _STYLE.sub(lambda found: _attributes(found[1]), _DEFINED.sub("", str(svg)))
    named = text.replace('role="img"', f'role="img" aria-label="{escape(label)}"', 1)
    return Markup(named)  # trusted as before: only its form has changed


def _attributes(style: str) -> str:
    pairs = [entry.split(":", 1) for entry in unescape(style).split(";") if ":" in entry]
    # the page's font
    kept = [(name.strip(), value.strip()) for name, value in pairs if name.strip() != "font-family"]
    return "".join(f' {name}="{escape(value)}"' for name, value in kept)
