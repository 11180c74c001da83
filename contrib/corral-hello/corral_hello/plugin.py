"""All of the plugin in one file: its table, its event, its route, and the class that contributes them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import peewee

from corral.auth.principal import WRITERS, Permission, Principal
from corral.database.model import SHARED, Model
from corral.events.event import Event, emit
from corral.http.routes import Routes
from corral.plugin import Metric, Plugin, hookimpl
from corral.schema.fields import Name


class Greeting(Model):
    """Whom we greeted, and how often."""

    visibility = SHARED

    name = peewee.CharField(primary_key=True, max_length=100)
    times = peewee.IntegerField()

    class Meta:
        table_name = "hello_greetings"


class Greeted(Event, kw_only=True):
    """Somebody was greeted."""

    event = "hello.greeted"

    name: str
    times: int


class Greet(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whom to greet."""

    name: Name


class Hello(msgspec.Struct, kw_only=True):
    """The greeting, and how often this name has been greeted."""

    greeting: str
    times: int


routes = Routes("/hello", tag="Hello")


@routes.post("/", needs="hello.greet")
def greet(body: Greet, caller: Principal) -> Hello:
    """Greet somebody."""
    times = Greeting.times + 1  # counted by the database: two greetings at once are two
    Greeting.insert(name=body.name, times=1).on_conflict(
        conflict_target=[Greeting.name], update={Greeting.times: times}
    ).execute()
    greeted = Greeted(name=body.name, times=Greeting.get_by_id(body.name).times)
    emit(greeted, object=("greeting", body.name), owner=caller.user_id)
    return Hello(greeting=f"Hello, {body.name}!", times=greeted.times)


def count_names() -> dict[tuple[str, ...], float]:
    """How many names were greeted, for the metric."""
    return {(): float(Greeting.select().count())}


class HelloPlugin(Plugin):
    """Hello: greets, and counts whom.

    It is an example to begin with: everything that a plugin is made of, once.
    """

    name = "hello"
    permissions = (Permission("hello.greet", "Greet somebody", holders=WRITERS),)

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [Greeting]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [Greeted]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [Metric(name="corral_hello_names", help="Names that were greeted", collect=count_names)]
