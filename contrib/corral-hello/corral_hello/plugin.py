"""The whole plugin in one file: its table, event, route and metric, and the plugin class that registers them."""

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
    """A name, and the number of times that it has been greeted."""

    visibility = SHARED

    name = peewee.CharField(primary_key=True, max_length=100)
    times = peewee.IntegerField()

    class Meta:
        table_name = "hello_greetings"


class Greeted(Event, kw_only=True):
    """A name was greeted."""

    event = "hello.greeted"

    name: str
    times: int


class Greet(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request body of a greeting: the name to greet."""

    name: Name


class Hello(msgspec.Struct, kw_only=True):
    """A greeting, and the number of times that the name has been greeted."""

    greeting: str
    times: int


routes = Routes("/hello", tag="Hello")


@routes.post("/", needs="hello.greet")
def greet(body: Greet, caller: Principal) -> Hello:
    """Greet a name and count the greeting."""
    times = Greeting.times + 1  # incremented by the database, so that concurrent greetings are both counted
    Greeting.insert(name=body.name, times=1).on_conflict(
        conflict_target=[Greeting.name], update={Greeting.times: times}
    ).execute()
    greeted = Greeted(name=body.name, times=Greeting.get_by_id(body.name).times)
    emit(greeted, object=("greeting", body.name), owner=caller.user_id)
    return Hello(greeting=f"Hello, {body.name}!", times=greeted.times)


def count_names() -> dict[tuple[str, ...], float]:
    """Return the value of the `corral_hello_names` metric: the number of greeted names."""
    return {(): float(Greeting.select().count())}


class HelloPlugin(Plugin):
    """An example plugin that greets names and counts the greetings.

    It contains one example of each building block of a plugin. Use it as a starting point.
    """

    name = "hello"
    permissions = (Permission("hello.greet", "Greet a person", holders=WRITERS),)

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
        return [Metric(name="corral_hello_names", help="Number of names that have been greeted.", collect=count_names)]
