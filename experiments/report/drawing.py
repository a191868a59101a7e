"""Figures as PNG and SVG, in one style, without a screen."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

from experiments.report.content import Figure

STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "l2l_implicit",  # the same picture is the same file
}
PNG_DPI = 160


def pictures(figure: Figure) -> tuple[bytes, bytes]:
    """The figure's PNG and SVG."""
    with matplotlib.rc_context(STYLE):
        drawing = figure.draw()
        png, svg = io.BytesIO(), io.BytesIO()
        drawing.savefig(png, format="png", dpi=PNG_DPI)
        drawing.set_layout_engine("none")  # it is laid out by now, and doing so takes the most time
        drawing.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()
