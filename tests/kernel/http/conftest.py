"""A kernel with a plugin whose routes do what the tests need, in process and on a real port."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

import msgspec
import peewee
import pytest

from corral import clock
from corral.auth.principal import ANY_CALLER, PUBLIC, Permission, Principal
from corral.database.model import SHARED, IdField, InstantField, JSONField, Model
from corral.errors import Conflict, NotFound
from corral.events.event import Event, emit
from corral.http.answers import IfMatch, Wait
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.http.routes import Routes
from corral.ids import new_id
from corral.plugin import Plugin, hookimpl
from corral.schema.fields import Title
from corral.testing.kit import Kit
from corral.testing.server import serving


class Thing(Model):
    """A row of the probe."""

    visibility = SHARED
    id = IdField(primary_key=True)
    title = peewee.CharField()
    data = JSONField(default=dict)
    version = peewee.IntegerField(default=1)
    created_at = InstantField()

    class Meta:
        table_name = "probe_things"
        indexes = ((("created_at", "id"), False),)


class NewThing(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    title: Title
    priority: Annotated[int, msgspec.Meta(ge=0, le=9)] = 0
    data: dict[str, Any] = {}


class ThingView(msgspec.Struct, kw_only=True):
    id: str
    title: str
    data: dict[str, Any]
    version: int
    created_at: str


class ThingQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    title: list[str] = msgspec.field(default_factory=list)


class WaitQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    count: int
    wait: Annotated[int, msgspec.Meta(ge=0, le=30)] = 0
    until: float = 0.0


class ThingMade(Event, kw_only=True):
    """A thing was made."""

    event = "probe.made"
    thing_id: str


routes = Routes("/probe", tag="Probe")


def view(row: Thing) -> ThingView:
    return ThingView(id=row.id, title=row.title, data=row.data, version=row.version, created_at=row.created_at)


@routes.post("/things", needs="probe.write", status=201, raises=("duplicate",))
def create_thing(body: NewThing) -> ThingView:
    """Create a thing."""
    if body.title == "taken":
        raise Conflict("taken", code="duplicate", existing_id="x")
    row = Thing.create(id=new_id(), title=body.title, data=body.data, created_at=clock.now())
    emit(ThingMade(thing_id=row.id), object=("thing", row.id))
    return view(row)


@routes.get("/things", needs="probe.read")
def list_things(query: ThingQuery, caller: Principal) -> Page[ThingView]:
    """List things."""
    rows = Thing.select()
    if query.title:
        rows = rows.where(Thing.title.in_(query.title))
    return paginate(rows, query, caller, scope="probe", order=newest_first(Thing), make=view)


@routes.get("/things/{id}", needs="probe.read")
def get_thing(id: str) -> ThingView:
    """Get a thing."""
    row = Thing.get_or_none(Thing.id == id)
    if row is None:
        raise NotFound
    return view(row)


@routes.patch("/things/{id}", needs="probe.write")
def update_thing(id: str, body: NewThing, match: IfMatch) -> ThingView:
    """Change a thing."""
    row = Thing.get_or_none(Thing.id == id)
    if row is None:
        raise NotFound
    match.check(row.version)
    Thing.update(title=body.title, version=Thing.version + 1).where(Thing.id == id).execute()
    return view(Thing.get_by_id(id))


@routes.get("/wait", needs="probe.read")
def wait_for_things(query: WaitQuery) -> dict[str, int] | Wait:
    """Wait until there are so many things."""
    found = Thing.select().count()
    if found < query.count and clock.time_s() < query.until:
        return Wait(("probe.made",), query.until)
    return {"count": found}


@routes.get("/raises", needs=PUBLIC)
def raise_error() -> dict[str, int]:
    """Has a bug."""
    raise RuntimeError("secret detail")


SLOW_READ = threading.Event()


@routes.get("/slow", needs=PUBLIC)
def sleep_in_a_read() -> dict[str, int]:
    """Waits where it must not."""
    SLOW_READ.wait(10)
    return {}


@routes.get("/thread", needs=PUBLIC)
def get_thread() -> dict[str, str]:
    """Tell which thread reads."""
    return {"name": threading.current_thread().name}


@routes.post("/echo", needs=ANY_CALLER, body_limit=64 * 1024)
async def echo_data(body: NewThing) -> NewThing:
    """Answer what was sent."""
    return body


class ProbePlugin(Plugin):
    """Routes for tests of the request path."""

    name = "probe"
    permissions = (
        Permission("probe.read", "Read things", holders=("viewer", "member")),
        Permission("probe.write", "Write things", holders=("member",)),
    )

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [Thing]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [ThingMade]


@pytest.fixture
async def probe(make_kit: Any, request: pytest.FixtureRequest) -> Kit:
    """A kernel with the probe; `indirect` parameters are configuration overrides."""
    kit: Kit = await make_kit(plugins=[ProbePlugin], config=getattr(request, "param", None))
    assert kit.loaded("probe").state == "active", kit.loaded("probe").reason
    await kit.kernel.database.work(lambda: Thing._meta.database.create_tables([Thing]))
    return kit


@pytest.fixture(params=["uvicorn", "hypercorn"])
def server_name(request: pytest.FixtureRequest) -> str:
    """Each server in turn."""
    return str(request.param)


@pytest.fixture
async def port(probe: Kit, server_name: str) -> AsyncIterator[int]:
    """The probe on a real port, as `corral serve` serves it."""
    async with serving(probe, server_name) as number:
        yield number
