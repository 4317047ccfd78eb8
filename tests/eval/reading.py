"""What the printed tables and the HTML pages hold."""

import re
from html.parser import HTMLParser

ADDRESSES = ("src", "srcset", "href", "data", "poster", "action", "background", "xlink:href")


def cells(markdown: str, start: str) -> list[str]:
    """Of the first row of a table that starts so."""
    row = next(line for line in markdown.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ADDRESSES:
                self.addresses.append(value)
            if name.startswith("on"):
                self.scripts.append(value)
            if name == "style":
                self._style(value)
        if tag == "script":
            self.scripts.append(tag)

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self._style(data)

    def _style(self, css: str) -> None:
        self.addresses += re.findall(r"url\(([^)]*)\)|(@import)", css)


def addresses(page: str) -> list[str]:
    """Whatever the page would load or link to outside of itself; fails where it holds scripts."""
    parser = _Page()
    parser.feed(page)
    assert parser.scripts == []
    return [a for a in parser.addresses if not str(a).startswith(("#", "data:image/"))]
