"""Every relative link in the documentation leads to a file or folder that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def targets(text: str) -> list[str]:
    return [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    missing = [link for link in targets(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert missing == []


def test_links_are_found():
    text = "[a](b.md) ![c](d/e.png) [`f`](../g.py#part) [h](https://example.org/i.md) [j](#here) [k](mailto:l@m)"
    assert targets(text) == ["b.md", "d/e.png", "../g.py"]
    assert len(targets((ROOT / "docs" / "tour.md").read_text(encoding="utf-8"))) > 40
