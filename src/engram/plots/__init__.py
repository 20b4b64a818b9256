"""Pictures of results, one file a kind. Each function returns a matplotlib figure of its own;
nothing global is touched.
"""

from engram.plots.averages import plot_average, plot_lines, plot_severed
from engram.plots.heat_maps import plot_trace
from engram.plots.layer_cards import plot_layer_card
from engram.plots.lenses import plot_lens, plot_memories, plot_refinement

__all__ = [
    "plot_average",
    "plot_layer_card",
    "plot_lens",
    "plot_lines",
    "plot_memories",
    "plot_refinement",
    "plot_severed",
    "plot_trace",
]
