"""The look of the dashboard's panels: one palette, distinguishable in grey as well, and one kind of figure."""

from __future__ import annotations

from typing import Any

from bokeh.models import BasicTicker, CustomJSTickFormatter, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

# Okabe and Ito's palette, as in dask_isgd.display.plots.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, MUTED, LINE, NEVER = "#222222", "#6b6b6b", "#808080", "#bdbdbd"
"""Text, lesser text, what is drawn faintly on a page of any colour, and chunks without weights."""

AGES = (
    *("#fde725", "#d2e21b", "#a5db36", "#7ad151", "#54c568", "#35b779", "#22a884", "#1f988b", "#23888e"),
    *("#2a788e", "#31688e", "#39568c", "#414487", "#472f7d", "#481a6c", "#440154"),
)
"""Viridis in reverse: new is bright, old is dark."""


def new_plot(title: str, *, x: str = "step", x_log: bool = False, y_log: bool = False, **settings: Any) -> Any:
    """Return an empty figure; its axes are linear by default."""
    plot = figure(
        title=title,
        x_axis_label=x,
        x_axis_type="log" if x_log else "linear",
        y_axis_type="log" if y_log else "linear",
        sizing_mode="stretch_both",
        min_height=150,
        min_width=200,
        tools="box_zoom,reset",
        toolbar_location="right",
        background_fill_color=None,  # the page shows through
        border_fill_color=None,
        outline_line_color=None,
        **settings,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.title.text_color = INK
    plot.title.text_font_size = "12px"
    plot.title.text_font_style = "bold"
    plot.min_border_right = 12
    for axis in plot.axis:
        style_axis(axis)
    for grid in plot.grid:
        grid.grid_line_color = LINE
        grid.grid_line_alpha = 0.2
        grid.minor_grid_line_color = None
    plot.yaxis.ticker.desired_num_ticks = 5
    if x_log:
        plot.xaxis.ticker.desired_num_ticks = 5
    else:
        whole_numbers(plot.xaxis, ticks=4)
    if y_log:
        # Bokeh's own formatter gives all labels the digits of the largest: 0.0003 beside 0.03 would be 0
        plot.yaxis.formatter = CustomJSTickFormatter(code="return String(Number(tick.toPrecision(3)))")
    return plot


def style_axis(axis: Any, color: str = MUTED) -> None:
    """Set the look of one axis."""
    axis.axis_line_color = axis.major_tick_line_color = LINE
    axis.axis_line_alpha = axis.major_tick_line_alpha = 0.6
    axis.minor_tick_line_color = None
    axis.major_label_text_color = color
    axis.major_label_text_font_size = "11px"
    axis.axis_label_text_color = color
    axis.axis_label_text_font_style = "normal"
    axis.axis_label_text_font_size = "11px"
    axis.axis_label_standoff = 4


def whole_numbers(axis: Any, ticks: int = 5) -> None:
    """Label an axis with about so many whole numbers, none of them twice."""
    axis.ticker = BasicTicker(min_interval=1, desired_num_ticks=ticks)
    axis.formatter = NumeralTickFormatter(format="0,0")


def legend(plot: Any) -> None:
    """Put a small legend below the figure, where it covers nothing; a click on an entry hides its line."""
    plot.add_layout(plot.legend[0], "below")
    plot.legend.orientation = "horizontal"
    plot.legend.location = "left"
    plot.legend.label_text_font_size = "11px"
    plot.legend.label_text_color = INK
    plot.legend.border_line_color = None
    plot.legend.background_fill_color = None
    plot.legend.spacing = 8
    plot.legend.padding = 0
    plot.legend.margin = 2
    plot.legend.glyph_width = 20
    plot.legend.click_policy = "hide"


def hover(plot: Any, renderer: Any, *tips: tuple[str, str], mode: str = "vline") -> None:
    """Show the values under the pointer."""
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=list(tips), mode=mode))
