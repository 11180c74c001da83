"""Routes for the API documentation: the OpenAPI document, the documentation page, and explanations of problem codes."""

from __future__ import annotations

import textwrap
from importlib import resources
from importlib.metadata import version
from typing import Any

import msgspec

from corral.auth.principal import PUBLIC
from corral.errors import CODES, NotFound
from corral.http.answers import Request, Text
from corral.http.routes import API_PREFIX, Routes
from corral.plugin import ApiDocument

routes = Routes("", tag="Documentation")

PAGE_WIDTH = 100
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; frame-ancestors 'none'"
)


class RootView(msgspec.Struct, kw_only=True):
    """The service's name and version, and the path of its documentation."""

    service: str
    version: str
    docs: str


@routes.get("/", needs=PUBLIC, root=True)
async def read_root(request: Request) -> RootView | Text:
    """Return the service's name and version. Browsers get a page with a link to the documentation."""
    if "text/html" in (request.header("accept") or ""):
        return _static_file("root.html", "text/html; charset=utf-8")
    return RootView(service="corral", version=version("corral"), docs=f"{API_PREFIX}/docs")


@routes.get("/openapi.json", needs=PUBLIC)
async def read_openapi(document: ApiDocument) -> Any:
    """Read the OpenAPI 3.1 document of this API."""
    return msgspec.Raw(document.render())


@routes.get("/docs", needs=PUBLIC)
async def read_api_docs_page() -> Text:
    """Return the documentation page."""
    return _static_file("index.html", "text/html; charset=utf-8")


@routes.get("/docs/docs.js", needs=PUBLIC)
async def read_docs_script() -> Text:
    """Return the script of the documentation page."""
    return _static_file("docs.js", "text/javascript; charset=utf-8")


@routes.get("/docs/docs.css", needs=PUBLIC)
async def read_docs_style() -> Text:
    """Return the style sheet of the documentation page."""
    return _static_file("docs.css", "text/css; charset=utf-8")


@routes.get("/problems/{code}", needs=PUBLIC, root=True)
async def read_problem(code: str) -> Text:
    """Explain in plain text what a problem code means and how to resolve the problem."""
    if code not in CODES:
        raise NotFound(f"No problem type has the code {code}.")
    status, title, remedy = CODES[code]
    what_to_do = f"\n{textwrap.fill(remedy, PAGE_WIDTH)}\n" if remedy else ""
    return Text(f"{code}\n\n{title}. Sent with HTTP status {status}.\n{what_to_do}")


def _static_file(name: str, media_type: str) -> Text:
    body = resources.files("corral_core.plugin_admin.api_docs").joinpath(name).read_text("utf-8")
    return Text(body, media_type, {"Content-Security-Policy": PAGE_POLICY})
