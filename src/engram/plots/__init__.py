"""Pictures of results, one file a kind. Each function returns a matplotlib figure of its own; nothing global is touched."""

from engram.plots.traces import plot_trace

__all__ = ["plot_trace"]
