"""How the dashboard's pictures look: one palette, one figure, told apart in grey as well."""

from __future__ import annotations

from typing import Any

from bokeh.models import BasicTickFormatter, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

# Okabe and Ito's palette, as in dask_isgd.display.plots.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, MUTED, GRID, SHADE, NEVER = "#222222", "#6b6b6b", "#e6e6e6", "#e9e9e9", "#bdbdbd"

AGES = (
    *("#fde725", "#d2e21b", "#a5db36", "#7ad151", "#54c568", "#35b779", "#22a884", "#1f988b", "#23888e"),
    *("#2a788e", "#31688e", "#39568c", "#414487", "#472f7d", "#481a6c", "#440154"),
)
"""Fresh is bright, old is dark: viridis backwards."""


def plot(title: str, *, x: str = "step", x_log: bool = False, y_log: bool = False, **settings: Any) -> Any:
    """An empty figure; axes are linear unless asked otherwise."""
    made = figure(
        title=title,
        x_axis_label=x,
        x_axis_type="log" if x_log else "linear",
        y_axis_type="log" if y_log else "linear",
        sizing_mode="stretch_both",
        min_height=150,
        min_width=200,
        tools="box_zoom,reset",
        toolbar_location="right",
        background_fill_color="#ffffff",
        border_fill_color="#ffffff",
        outline_line_color=None,
        **settings,
    )
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.title.text_color = INK
    made.title.text_font_size = "13px"
    made.title.text_font_style = "bold"
    made.min_border_right = 12
    for axis in made.axis:
        dress(axis)
    for grid in made.grid:
        grid.grid_line_color = GRID
        grid.minor_grid_line_color = None
    made.xaxis.ticker.desired_num_ticks = 5
    made.yaxis.ticker.desired_num_ticks = 5
    if not x_log:
        made.xaxis.formatter = NumeralTickFormatter(format="0,0")
    if y_log:
        made.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    return made


def dress(axis: Any, color: str = MUTED) -> None:
    """The look of one axis."""
    axis.axis_line_color = "#b0b0b0"
    axis.major_tick_line_color = "#b0b0b0"
    axis.minor_tick_line_color = None
    axis.major_label_text_color = color
    axis.major_label_text_font_size = "11px"
    axis.axis_label_text_color = color
    axis.axis_label_text_font_style = "normal"
    axis.axis_label_text_font_size = "11px"
    axis.axis_label_standoff = 4


def legend(made: Any) -> None:
    """A small legend below the figure, where it hides nothing; a click hides a line."""
    made.add_layout(made.legend[0], "below")
    made.legend.orientation = "horizontal"
    made.legend.location = "left"
    made.legend.label_text_font_size = "11px"
    made.legend.label_text_color = INK
    made.legend.border_line_color = None
    made.legend.spacing = 10
    made.legend.padding = 0
    made.legend.margin = 2
    made.legend.glyph_width = 22
    made.legend.click_policy = "hide"


def hover(made: Any, renderer: Any, *tips: tuple[str, str], mode: str = "vline") -> None:
    """Values under the pointer."""
    made.add_tools(HoverTool(renderers=[renderer], tooltips=list(tips), mode=mode))
