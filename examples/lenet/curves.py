"""Draws the demo's curves: training loss and test accuracy by epoch, one line per net."""

import math
from pathlib import Path

from examples.lenet.experiment import FASTBN, PLAIN, STOCK
from fastbn.cli.errors import require

# Okabe and Ito's colours, which the colour-blind can tell apart. fastbn's line covers torch.nn's: narrow dashes and
# hollow markers on a wide line show both.
_STYLES = {
    PLAIN: {"color": "#000000", "linestyle": ":", "linewidth": 1.8, "marker": "^", "markersize": 6},
    STOCK: {"color": "#56B4E9", "linestyle": "-", "linewidth": 6, "marker": "o", "markersize": 10},
    FASTBN: {
        "color": "#D55E00",
        "linestyle": (0, (3, 2)),
        "linewidth": 1.8,
        "marker": "o",
        "markersize": 6,
        "markerfacecolor": "white",
        "markeredgewidth": 1.5,
    },
}
_LABELS = {PLAIN: "without BatchNorm", STOCK: "torch.nn.BatchNorm", FASTBN: "fastbn.BatchNorm"}


def save_curves(path: Path, title: str, loss: dict[str, list[float]], accuracy: dict[str, list[float]]) -> None:
    """Write a PNG of `loss` and `accuracy` (fractions), each a list over the epochs by the name of the net."""
    figures = require("demo", "matplotlib.figure")
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # A Figure of its own, without pyplot, needs no display and leaves no global state.
    figure = figures.Figure(figsize=(10.5, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, values in zip(panels, (loss, accuracy)):
        for name, style in _STYLES.items():
            epochs = range(1, len(values[name]) + 1)
            spacing = math.ceil(len(epochs) / 15)
            axes.plot(epochs, values[name], label=_LABELS[name], markevery=spacing, clip_on=False, zorder=3, **style)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="training loss (mean cross-entropy of the epoch)", title="Training loss", ylim=(0, None))
    panels[1].set(ylabel="test images classified correctly", title="Test accuracy", ylim=(0, 1))
    panels[1].yaxis.set_major_formatter(PercentFormatter(1))
    # It contains the name of a folder, in which a $ does not begin a formula.
    figure.suptitle(title, fontsize=12, parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, handlelength=4)
    figure.savefig(path)
