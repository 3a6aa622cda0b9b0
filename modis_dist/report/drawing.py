"""Panels, legends, matrices of numbers and colours of figures. Independent of results.

Neither uses nor changes matplotlib's global state. Names from data are drawn as plain text, never as formulas.
Colours are those of Okabe and Ito (modalities) and Paul Tol's "muted" (classes); both suit colour-blind readers.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from modis_dist.runtime.files import write_bytes
from modis_dist.runtime.text import plain

Points = NDArray[np.float64]
Entry = tuple[str, Line2D]

MUTED = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODALITY_COLOURS = (*OKABE_ITO, *MUTED)
CLASS_COLOURS = (*MUTED, "#000000")
GREY, PALE = "0.45", "0.85"
DPI = 100
CROWDED = 20  # classes of a matrix above which names are small and cells have no text


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def grid(panels: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels of ``width`` x ``height`` inches, row by row."""
    columns = max(1, min(columns, panels))
    lines = max(1, math.ceil(panels / columns))
    figure = Figure(figsize=(columns * width, lines * height), dpi=DPI, layout="constrained")
    axes = [figure.add_subplot(lines, columns, number) for number in range(1, panels + 1)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, axes


def heading(axes: Axes, *lines: str) -> None:
    """Add a title of one or more lines above the left corner."""
    text = "\n".join(drawable(line, limit=100) for line in lines)
    axes.set_title(text, fontsize=10, loc="left", parse_math=False)


def figure_legend(figure: Figure, entries: Sequence[Entry]) -> None:
    """Add a legend of all panels on their right."""
    _name(figure.legend(**_unnamed(entries), loc="outside right upper"), entries)


def axes_legend(axes: Axes, entries: Sequence[Entry], *, columns: int = 1) -> None:
    """Add a legend of one panel on its right."""
    position = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0, "ncols": columns}
    _name(axes.legend(**_unnamed(entries), **position), entries)


def matrix(
    axes: Axes, values: Points, lines: Sequence[str], columns: Sequence[str], *, colours: str, rotation: int
) -> AxesImage:
    """Return an image of values in 0..1 with names of rows and columns; nan is grey."""
    image = axes.imshow(values, vmin=0, vmax=1, cmap=colormaps[colours].with_extremes(bad=PALE), aspect="auto")
    size = 9 if len(lines) <= CROWDED else 6
    column_names, line_names = ([drawable(name, limit=16) for name in names] for names in (columns, lines))
    axes.set_xticks(range(len(columns)), column_names, parse_math=False, fontsize=size, rotation=rotation)
    axes.set_yticks(range(len(lines)), line_names, parse_math=False, fontsize=size)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def cell_texts(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], *, size: float) -> None:
    """Add a text to every cell of a ``matrix``, white on dark cells."""
    colours = image.to_rgba(np.asarray(image.get_array()))
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            luminance = colours[i, j, :3] @ (0.299, 0.587, 0.114)
            colour = "white" if luminance < 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour, parse_math=False)


def drawable(name: str, *, limit: int = 24) -> str:
    """Return the name on one line, with characters that the font lacks as escapes."""
    font = get_font(findfont(FontProperties()))
    characters = (c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in name)
    return plain("".join(characters), limit=limit)


def _unnamed(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return legend arguments with numbers as labels: matplotlib drops labels that begin with an underscore."""
    handles = [handle for _, handle in entries]
    return {"handles": handles, "labels": list(map(str, range(len(handles)))), "frameon": False, "fontsize": 9}


def _name(legend: Any, entries: Sequence[Entry]) -> None:
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(drawable(name))
