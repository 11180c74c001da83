"""The extraction of readable text from an HTML page: headings, paragraphs, lists, table cells and link targets."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import urljoin

SKIPPED = frozenset({"script", "style", "noscript", "template", "svg", "head", "iframe", "object", "select"})
BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "body", "dd", "div", "dl", "dt", "fieldset", "figcaption", "figure",
    "footer", "form", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table", "tbody", "tfoot",
    "thead", "tr", "ul",
})  # fmt: skip
HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_SPACES = re.compile(r"[ \t\r\n\f\u00a0]+")
_BLANKS = re.compile(r"\n{3,}")


def readable(html: str, base: str = "") -> str:
    """Return the text of a page. Never raises an exception. `base`: the URL for resolving relative links."""
    page = _Page(base)
    page.feed(html)
    if not page.rawdata.startswith("<"):  # an unclosed tag is not text, and is slow to parse as text
        page.close()
    return page.text()


class _Page(HTMLParser):
    """A parser that collects the text that a browser would show."""

    def __init__(self, base: str) -> None:
        super().__init__(convert_charrefs=True)
        self._base = base
        self._parts: list[str] = []
        self._title: list[str] = []
        self._hidden: list[str] = []
        self._in_title = False
        self._pre = 0
        self._links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self._in_title = True
        if tag in SKIPPED and tag not in self._hidden:  # each tag is stored once, so the list stays short
            self._hidden.append(tag)
        if self._hidden:
            if tag == "body":  # the tag `head` was never closed
                self._hidden.clear()
            return
        if tag in HEADINGS:
            self._parts.append("\n\n" + HEADINGS[tag])
        elif tag == "br":
            self._parts.append("\n")
        elif tag == "li":
            self._parts.append("\n- ")
        elif tag in ("td", "th"):
            self._parts.append(" | ")
        elif tag in BLOCKS:
            self._parts.append("\n\n" if tag == "p" else "\n")
        if tag == "pre":
            self._pre += 1
        if tag == "a":
            self._links.append(_link_target(self._base, dict(attrs).get("href")))
        elif tag == "img" and (alt := dict(attrs).get("alt")):
            self._parts.append(f"[{alt}]")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
            return
        if self._hidden:
            return
        if tag == "a" and self._links and (target := self._links.pop()):
            self._parts.append(f" ({target})")
        elif tag in HEADINGS or tag == "p":
            self._parts.append("\n\n")
        elif tag in BLOCKS:
            self._parts.append("\n")
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title.append(data)
        elif not self._hidden:
            self._parts.append(data if self._pre else _SPACES.sub(" ", data))

    def text(self) -> str:
        """Return the title and the text, with at most one empty line between blocks."""
        lines = [line.strip(" ") for line in "".join(self._parts).split("\n")]
        body = _BLANKS.sub("\n\n", "\n".join(lines)).strip()
        title = _SPACES.sub(" ", "".join(self._title)).strip()
        return f"{title}\n\n{body}".strip() if title and not body.startswith(f"# {title}") else body


def _link_target(base: str, href: str | None) -> str | None:
    """Return the absolute URL of a link, or None if the link does not lead to another page."""
    if not href or href.startswith(("#", "javascript:", "data:")):
        return None
    try:
        return urljoin(base, href.strip())[:500]
    except ValueError:
        return None
