"""Text of HTML pages."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral_plugins.tools.service.http_tools import html_to_text

PAGE = """<!doctype html><html><head><title> The
 title </title><style>p { color: red }</style><script>alert("<p>no</p>")</script></head>
<body><h1>Hello &amp; welcome</h1><p>A  paragraph with <b>bold</b>
words and <a href="/there?x=1&amp;y=2">a link</a>.</p><p>Another<br>line</p>
<ul><li>one<li>two</ul><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>  kept
    as it is</pre><img src=x alt="a picture"><noscript>hidden</noscript>
<a href="javascript:x()">script</a></body></html>"""


def test_a_page_reads_like_a_page() -> None:
    text = html_to_text(PAGE, "https://example.org/page")
    assert text.startswith("The title\n\n# Hello & welcome\n\n")
    assert "A paragraph with bold words and a link (https://example.org/there?x=1&y=2)." in text
    assert "Another\nline" in text
    assert "- one\n- two" in text
    assert "| a | b" in text
    assert "kept\n" in text
    assert "[a picture]" in text
    for hidden in ("color", "alert", "hidden", "javascript"):
        assert hidden not in text


def test_a_head_that_is_never_closed_hides_nothing() -> None:
    assert html_to_text("<head><title>T</title><body><p>text") == "T\n\ntext"


def test_what_begins_at_the_end_and_never_ends_is_left_out() -> None:
    assert html_to_text("<p>a < b & c</p> text <!-- and") == "a < b & c\n\ntext"
    assert html_to_text("text & more <a href='/") == "text & more"
    assert html_to_text("fish &amp") == "fish &"


@pytest.mark.parametrize("page", ["<svg>" * 40_000 + "</b>" * 40_000, "<!--" * 75_000, "<a" * 150_000, "</" * 150_000])
def test_no_page_takes_long(page: str) -> None:
    began = time.thread_time()
    html_to_text(page)
    assert time.thread_time() - began < 3  # it took 8 s to minutes


@given(st.text(alphabet=st.sampled_from('<>/a!-?&;"= phtmlscrd\n'), max_size=300))
def test_whatever_the_page_it_is_read(html: str) -> None:
    assert isinstance(html_to_text(html, "https://example.org/"), str)
