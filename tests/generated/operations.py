"""What the running kernel serves, as data: each operation with its route and its part of the OpenAPI document.

Nothing here names an operation: whatever plugins are active, their operations are in the list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from tests.generated.samples import Samples

from corral.auth.principal import PUBLIC
from corral.http.routes import Route
from corral.testing.kit import Kit

BASE = "/api/v1"
_NAME = re.compile(r"\{([a-z_]+)\}")


class Operation(msgspec.Struct, frozen=True):
    """An operation at one of its addresses; `label` is `GET /tasks/{id}`."""

    route: Route
    spec: Mapping[str, Any]
    samples: Samples

    @property
    def label(self) -> str:
        return self.route.label

    @property
    def method(self) -> str:
        return self.route.method

    @property
    def path(self) -> str:
        return self.route.path

    @property
    def invalid_status(self) -> int:
        """The status for a request that is not valid: 422, but 400 where OpenAI's clients ask."""
        return 400 if self.path.startswith("/llm/") else 422

    @property
    def is_public(self) -> bool:
        return PUBLIC in self.route.needs

    @property
    def body_schema(self) -> Mapping[str, Any] | None:
        content = self.spec.get("requestBody", {}).get("content", {})
        found: Mapping[str, Any] | None = content.get("application/json", {}).get("schema")
        return found

    @property
    def takes_any_json(self) -> bool:
        """Whether the body is whatever its sender sends, as JSON or as a form."""
        return self.route.signature is not None and self.route.signature.body is bytes

    @property
    def query_names(self) -> list[str]:
        return [each["name"] for each in self.spec["parameters"] if each.get("in") == "query"]

    def sample_body(self) -> Any:
        """A body with the fields that are demanded, each as its schema says; None if the operation takes none."""
        return None if self.body_schema is None else self.samples.of(self.body_schema)

    def sample_query(self) -> str:
        """The parameters that are demanded."""
        pairs = [
            f"{each['name']}={self.samples.of(each['schema'])}"
            for each in self.spec["parameters"]
            if each.get("in") == "query" and each.get("required")
        ]
        return "?" + "&".join(pairs) if pairs else ""

    def at(self, values: Mapping[str, str] | None = None) -> str:
        """The path with these names; an id that nothing has where none is given."""
        return _NAME.sub(lambda name: (values or {}).get(name[1]) or self.samples.nothing(name[1]), self.path)

    def documents(self, status: int) -> bool:
        """Whether the document tells that the operation may answer so."""
        return str(status) in self.spec["responses"]


_documents: dict[frozenset[str], Any] = {}  # by the operations in it: writing one costs a third of a second


async def operations(kit: Kit) -> list[Operation]:
    """Every operation of the active plugins; fails when the document leaves one out."""
    routes = [endpoint.route for endpoint in kit.application.endpoints if endpoint.unavailable is None]
    served = frozenset(route.label for route in routes)
    if served not in _documents:
        _documents[served] = (await kit.client.get("/openapi.json")).json()
    document = _documents[served]
    samples = Samples(document)
    return [
        Operation(route, document["paths"][BASE + route.path.rstrip("/")][route.method.lower()], samples)
        for route in routes
    ]
