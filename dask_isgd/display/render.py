"""HTML from the templates of this package; every value is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_environment = Environment(
    loader=PackageLoader("dask_isgd.display"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Return ``templates/<template>.html`` filled with the values, escaped unless they are ``Markup``."""
    return _environment.get_template(f"{template}.html").render(values)
