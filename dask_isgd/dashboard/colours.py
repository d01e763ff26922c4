"""Pages of their own are light or dark as the page around them: JupyterLab, or what the browser's user prefers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bokeh.events import DocumentReady
from bokeh.models import Axis, ColorBar, CustomJS, GlobalInlineStyleSheet, InlineStyleSheet, Legend, Select, Title

from dask_isgd.dashboard.panel import Panel
from dask_isgd.dashboard.style import INK, MUTED

_CSS = """
html, body { color: #222; }
@media (prefers-color-scheme: dark) { html, body { background: #111; color: #ddd; } }
"""
_CHOICE_CSS = """
@media (prefers-color-scheme: dark) { .bk-input { background-color: #222; border-color: #555; color: #ddd; } }
"""
_DARK = {INK: "#dddddd", MUTED: "#a8a8a8"}
_TEXTS: dict[Any, tuple[str, ...]] = {
    Title: ("text_color",),
    Axis: ("major_label_text_color", "axis_label_text_color"),
    Legend: ("label_text_color",),
    ColorBar: ("major_label_text_color",),
}
_PAINT = """
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
const paint = () => texts.forEach(([model, property, light, dark]) => {
  model[property] = scheme.matches ? dark : light;
});
scheme.addEventListener("change", paint);
paint();
"""


def follow_colours(doc: Any, panels: Iterable[Panel]) -> None:
    """Have the browser choose the colours of a document and of the text in its figures, which it draws on canvases."""
    texts = []
    for panel in panels:
        for kind, properties in _TEXTS.items():
            for model in panel.root.select({"type": kind}):
                found = ((name, getattr(model, name)) for name in properties)
                texts += [[model, name, colour, _DARK[colour]] for name, colour in found if colour in _DARK]
    for root in doc.roots:
        root.stylesheets = [*root.stylesheets, GlobalInlineStyleSheet(css=_CSS)]
        for choice in root.select({"type": Select}):
            choice.stylesheets = [*choice.stylesheets, InlineStyleSheet(css=_CHOICE_CSS)]
    doc.js_on_event(DocumentReady, CustomJS(args={"texts": texts}, code=_PAINT))
