"""Text cells of CSV: none of them may become a formula, and all of them can be read back."""

from __future__ import annotations

RISKY = frozenset("=+-@＝＋－＠\t\r\n\0'")  # the quote itself too, so that reading back is exact
SKIPPED = (
    " \u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u3000\ufeff\u200b\u200c\u200d\u2060"
)


def cell(text: str) -> str:
    """The text, with a leading quote where a spreadsheet would take it for more than text."""
    if not text:
        return text
    seen = text.lstrip(SKIPPED)[:1]
    return f"'{text}" if text[0] in RISKY or (seen in RISKY and seen) else text


def text_of(cell: str) -> str:
    """The text that a cell was made of."""
    return cell.removeprefix("'")
