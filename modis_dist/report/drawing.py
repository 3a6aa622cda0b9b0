"""Parts that figures share: panels, legends, matrices of numbers, colours. Knows nothing of what is drawn.

No global state of matplotlib is used or changed. Names from data are shown as plain text, never as formulas.
Colours are Okabe and Ito's (modalities) and Paul Tol's "muted" (classes), both told apart with any colour vision.
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

from modis_dist.report.text import plain
from modis_dist.runtime.files import write_bytes

Points = NDArray[np.float64]
Entry = tuple[str, Line2D]

MUTED = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODALITY_COLOURS = (*OKABE_ITO, *MUTED)
CLASS_COLOURS = (*MUTED, "#000000")
GREY, PALE = "0.45", "0.85"
DPI = 100
CROWDED = 20  # rows of a matrix above which names are small and cells hold no text


def save(figure: Figure, path: Path) -> None:
    """Write a PNG in one step."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def grid(panels: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels of so many inches, read line by line."""
    columns = max(1, min(columns, panels))
    lines = max(1, math.ceil(panels / columns))
    figure = Figure(figsize=(columns * width, lines * height), dpi=DPI, layout="constrained")
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(panels)]
    for held in axes:
        held.spines[["top", "right"]].set_visible(False)
        held.tick_params(labelsize=9)
    return figure, axes


def heading(axes: Axes, *lines: str) -> None:
    """A title of one or more lines above the left corner."""
    text = "\n".join(drawable(line, limit=100) for line in lines)
    axes.set_title(text, fontsize=10, loc="left", parse_math=False)


def figure_legend(figure: Figure, entries: Sequence[Entry]) -> None:
    """A legend of all panels, to their right."""
    _name(figure.legend(**_unnamed(entries), loc="outside right upper"), entries)


def axes_legend(axes: Axes, entries: Sequence[Entry], *, columns: int = 1) -> None:
    """A legend of one panel, to its right."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0, "ncols": columns}
    _name(axes.legend(**_unnamed(entries), **place), entries)


def matrix(
    axes: Axes, values: Points, lines: Sequence[str], columns: Sequence[str], *, colours: str, rotation: int
) -> AxesImage:
    """An image of values in 0..1 with names at its sides; what is not a number is grey."""
    image = axes.imshow(values, vmin=0, vmax=1, cmap=colormaps[colours].with_extremes(bad=PALE), aspect="auto")
    size = 9 if len(lines) <= CROWDED else 6
    across, down = ([drawable(name, limit=16) for name in names] for names in (columns, lines))
    axes.set_xticks(range(len(columns)), across, parse_math=False, fontsize=size, rotation=rotation)
    axes.set_yticks(range(len(lines)), down, parse_math=False, fontsize=size)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def cell_texts(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], *, size: float) -> None:
    """A text in every cell of a ``matrix``, white where the cell is dark."""
    colours = image.to_rgba(np.asarray(image.get_array()))
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            luminance = colours[i, j, :3] @ (0.299, 0.587, 0.114)
            colour = "white" if luminance < 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour, parse_math=False)


def drawable(name: str, *, limit: int = 24) -> str:
    """The name on one line, with what the font cannot draw as escapes."""
    font = get_font(findfont(FontProperties()))
    drawn = (c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in name)
    return plain("".join(drawn), limit=limit)


def _unnamed(entries: Sequence[Entry]) -> dict[str, Any]:
    """Names are set afterwards: matplotlib leaves out those that begin with an underscore."""
    handles = [handle for _, handle in entries]
    return {"handles": handles, "labels": list(map(str, range(len(handles)))), "frameon": False, "fontsize": 9}


def _name(legend: Any, entries: Sequence[Entry]) -> None:
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(drawable(name))
