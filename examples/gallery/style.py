"""One look for all pictures: widths and font sizes that are legible at 390 pixels, and one colour per thing."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# 6.4 inches at 150 dots are 960 pixels. On a telephone, 390 wide, 10 points are then 8.5 pixels high.
WIDTH_INCHES = 6.4
RC = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10.5,
    "figure.titlesize": 12,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
# Okabe and Ito's colours, which the colour-blind can tell apart. Black is a net without BatchNorm and vermilion one
# with it, as in the curves of `fastbn demo`.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#0072B2", "#D55E00", "#CC79A7"),
)
GREY = "#767676"
PLAIN, BN, NOISY = "without BN", "with BN", "noisy BN"
COLOURS = {PLAIN: BLACK, BN: VERMILION, NOISY: BLUE}
MARKERS = {PLAIN: "^", BN: "o", NOISY: "s"}


def figure(height_inches: float) -> Figure:
    """Make a figure of the gallery's width. It is not pyplot's, so it needs no display and leaves no global state."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def legend_below(made: Figure, axes: Axes, columns: int) -> None:
    """Put the legend of `axes` below the whole figure."""
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handlelength=2.2)
