"""Kernels that several tests use: nothing of one test is left for the next."""

from __future__ import annotations

import functools
import re
import sqlite3
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import msgspec
import pytest

from corral.http.routes import Route, Routes
from corral.http.signature import Signature
from corral.kernel import Kernel
from corral.plugin import Plugin
from corral.testing.booted_kernels import BootedKernels, booted_kernels
from corral.testing.booting import KernelOptions, boot_kernel
from corral.testing.kit import Kit, make_kernel
from corral.testing.object_state import ObjectState, UnknownState

pytestmark = pytest.mark.one_engine

ALL = KernelOptions(None, None, {}, {})


class Slotted:
    """An object without `__dict__`."""

    __slots__ = ("first", "second")
    second: int

    def __init__(self) -> None:
        self.first = 1


class Record(msgspec.Struct):
    """A struct that may change."""

    name: str
    tags: list[str]


class World:
    """An object with every kind of state."""

    def __init__(self) -> None:
        self.mapping: dict[str, Any] = {"list": [1, {"deep": True}]}
        self.elements, self.queue = {1, 2}, deque([1], maxlen=3)
        self.slotted, self.record = Slotted(), Record("one", ["a"])
        self.count = self.counter()
        self.doubled = functools.lru_cache(maxsize=8)(lambda number: [number, number])

    def counter(self) -> Callable[[], int]:
        """Return a function with a variable of its own."""
        n = 0

        def count() -> int:
            nonlocal n
            n += 1
            return n

        return count


def test_every_kind_of_state_is_put_back() -> None:
    world = World()
    before, inner = world.mapping, world.mapping["list"]
    world.doubled(4)
    state = ObjectState([world])
    for _ in range(2):
        world.mapping["list"][1].clear()
        world.mapping, world.new = {}, "attribute"  # type: ignore[attr-defined]  # a test may do that
        before["another"] = 1
        world.elements.add(3)
        world.queue.extend([2, 3, 4])
        world.slotted.first, world.slotted.second = 2, 3
        world.record.name = "two"
        world.record.tags.append("b")
        assert world.count() == 1
        cached = world.doubled(4)
        state.restore()
        assert world.mapping is before
        assert world.mapping == {"list": [1, {"deep": True}]}
        assert world.mapping["list"] is inner
        assert not hasattr(world, "new")
        assert (world.elements, list(world.queue), world.queue.maxlen) == ({1, 2}, [1], 3)
        assert (world.slotted.first, hasattr(world.slotted, "second")) == (1, False)
        assert world.record == Record("one", ["a"])
        assert world.doubled(4) is not cached


def test_an_object_that_is_equal_but_not_the_same_is_put_back() -> None:
    old: list[int] = []
    world = types.SimpleNamespace(items=old)
    state = ObjectState([world])
    old.append(1)
    world.items = [1]
    state.restore()
    assert world.items is old
    assert old == []


def test_what_is_opaque_stays() -> None:
    hidden = types.SimpleNamespace(value=1)
    world = types.SimpleNamespace(hidden=hidden)
    state = ObjectState([world], opaque=[hidden])
    hidden.value = 2
    world.hidden = None
    state.restore()
    assert world.hidden is hidden
    assert hidden.value == 2


@pytest.mark.parametrize(
    "make", [lambda: (n for n in range(3)), lambda: iter([1]), lambda: sqlite3.connect(":memory:")]
)
def test_a_state_that_cannot_be_recorded_is_an_error(make: Callable[[], Any]) -> None:
    with pytest.raises(UnknownState, match=type(make()).__name__):
        ObjectState([types.SimpleNamespace(item=make())])


def describe(*roots: object, opaque: tuple[object, ...]) -> dict[str, str]:
    """Return the values of all attributes and items that can be reached, by their path from the roots."""
    found: dict[str, str] = {}
    numbers: dict[int, int] = {id(each): n for n, each in enumerate(opaque)}
    kept: list[Any] = []
    pending: deque[tuple[str, Any]] = deque((type(each).__name__, each) for each in roots)
    while pending:
        path, each = pending.popleft()
        if isinstance(each, (type, types.ModuleType, types.BuiltinFunctionType, Route, Routes, Signature)):
            found[path] = str(getattr(each, "__qualname__", type(each).__name__))
        elif isinstance(each, (str, bytes, int, float, PurePath, types.NoneType)):
            found[path] = repr(each)
        elif id(each) in numbers:
            found[path] = f"#{numbers[id(each)]}"
        else:
            numbers[id(each)] = len(numbers)
            kept.append(each)
            found[path] = type(each).__qualname__
            pending.extend((f"{path}{name}", value) for name, value in parts(each))
    return found


def parts(each: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes and items of an object, in an order that does not depend on addresses."""
    if isinstance(each, types.MethodType):
        yield from ((".__self__", each.__self__), (".__func__", each.__func__))
    elif isinstance(each, types.FunctionType):
        yield (".__qualname__", each.__qualname__)
        names = each.__code__.co_freevars
        for name, cell in zip(names, each.__closure__ or (), strict=True):
            yield (f".<{name}>", cell.cell_contents)
    elif isinstance(each, functools.partial):
        yield from ((".func", each.func), (".args", each.args), (".keywords", each.keywords))
    if isinstance(each, (list, tuple, deque)):
        yield from ((f"[{n}]", item) for n, item in enumerate(each))
    elif isinstance(each, (set, frozenset)):
        yield ("{}", " ".join(sorted(repr(item) if isinstance(item, str) else type(item).__name__ for item in each)))
    elif isinstance(each, dict):
        for n, (name, value) in enumerate(each.items()):
            yield from ((f"[{name!r}]", value),) if isinstance(name, str) else ((f"[{n}k]", name), (f"[{n}]", value))
    elif isinstance(each, msgspec.Struct):
        yield from ((f".{name}", getattr(each, name)) for name in each.__struct_fields__)
    try:
        attributes = object.__getattribute__(each, "__dict__")
    except AttributeError:
        return
    if isinstance(attributes, dict) and not isinstance(each, (types.FunctionType, types.MethodType)):
        yield from ((f".{name}", value) for name, value in attributes.items())


DIFFERENT = re.compile(
    r"""Kernel\.(
        redactor\._(matcher|encodings)\b.*                  # of the master key
        | keyring\.(source|keys|_by_id|_signing)\b.*
        | plugins\[\d+\]\.since                              # the time of the boot
        | container\._instances\[\d+\]\._began
        | config\.(data_dir|database\.url)
        | container\._instances\[\d+\]\.(folder|_?data_dir|token_file|_incoming)
        | (_?holder|container\._instances\[\d+\]\._?(holder|name|process))
        | consumers\[\d+\]\.(_holder|_following\._build\.<events>\._hash)
    )""",
    re.VERBOSE,
)
"""The paths to what differs between any two kernels: key, time of boot, folder, and the names of processes."""


def described(kernel: Kernel, application: Any) -> dict[str, str]:
    """Describe a kernel, except what belongs to threads."""
    return describe(kernel, application, opaque=(kernel.database, kernel.threads, kernel.loop_watch))


async def use_wildly(kit: Kit) -> None:
    """Leave traces in as many places as one can."""
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    for path in ("/users", "/plugins", "/tasks", "/agents", "/nothing", "/settings", "/circuit-breakers"):
        await admin.get(path)
        await member.get(path)
    bodies: list[Any] = [{"title": "A task"}, {"title": ""}, [], {"title": "A task", "nonsense": 1}]
    for body in bodies:
        await member.post("/tasks", body, headers={"idempotency-key": "k"})
    await member.post("/tasks", content=b"{" * 200)
    await admin.put("/settings/kernel/jobs_concurrency", {"value": 3})
    await admin.post("/plugins/triggers/disable", {"reason": "a test"})
    await admin.post("/secrets", {"name": "wild", "value": "a value that nobody guesses 1234"})
    await kit.client.post("/auth/login", {"email": "nobody@example.org", "password": "wrong password 1"})
    kit.kernel.registry.add_error("tasks", "a test", ValueError("wild"), None)
    kit.kernel.lifecycle.serving.clear()
    kit.kernel.redactor.set_values("wild", {"name": "another secret value 987"})
    await kit.run_jobs()
    await kit.events()


async def test_a_reused_kernel_equals_a_new_one(tmp_path: Path) -> None:
    kernels = BootedKernels()
    kernels.take(tmp_path / "never", ALL)
    (tmp_path / "first").mkdir()
    booted = kernels.take(tmp_path / "first", ALL)
    assert booted is not None
    at_first = described(booted.kernel, booted.application)
    await booted.kernel.start(jobs=True)
    await use_wildly(Kit(booted.kernel, booted.application))
    used = described(booted.kernel, booted.application)
    assert len({path for path in used if used[path] != at_first.get(path)}) > 100
    await booted.kernel.stop()
    await kernels.keep(booted)

    (tmp_path / "second").mkdir()
    again = kernels.take(tmp_path / "second", ALL)
    assert again is booted
    assert described(again.kernel, again.application) == at_first
    kernel, application = boot_kernel(tmp_path / "third", ALL)
    new = described(kernel, application)
    differs = {
        path for path in {*new, *at_first} if _without_number(new.get(path)) != _without_number(at_first.get(path))
    }
    assert sorted(path for path in differs if not DIFFERENT.fullmatch(path)) == []
    kernel.database.close()
    assert rows(tmp_path / "second") == rows(tmp_path / "third")
    again.kernel.database.close()
    again.place.remove()


def _without_number(value: str | None) -> str | None:
    return "#" if value is not None and value.startswith("#") else value


def rows(folder: Path) -> list[str]:
    """Return the content of the database of an installation."""
    connection = sqlite3.connect(folder / "data" / "corral.db")
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


async def kernel_of(folder: Path, *plugins: type[Plugin] | str, **options: Any) -> Kernel:
    """Make a kernel that may be reused, use it, and return it."""
    async with make_kernel(folder, plugins=plugins, reuse=True, **options) as kit:
        assert (await kit.client.get("/auth/me")).status == 401
        assert are_same(kit.kernel.config.data_dir, folder / "data")
        return kit.kernel


def are_same(one: Path, other: Path) -> bool:
    """Return whether both paths lead to one folder."""
    return one.samefile(other)


class QuietPlugin(Plugin):
    """A plugin that does nothing."""

    name = "quiet"


class ThreadPlugin(Plugin):
    """A plugin that has a generator, the state of which nobody can record."""

    name = "threads"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.numbers = (n for n in range(3))


async def test_from_the_second_time_on_a_kernel_is_kept_for_the_same_options(tmp_path: Path) -> None:
    first = await kernel_of(tmp_path / "1", QuietPlugin)
    second = await kernel_of(tmp_path / "2", QuietPlugin)
    assert second is not first
    assert await kernel_of(tmp_path / "3", QuietPlugin) is second
    other = {"server.public_url": "https://corral.example.org"}
    assert await kernel_of(tmp_path / "4", QuietPlugin, config=other) is not second
    assert await kernel_of(tmp_path / "5", QuietPlugin) is second


async def test_a_folder_with_an_installation_gets_a_new_kernel(tmp_path: Path) -> None:
    for name in ("1", "2"):
        kept = await kernel_of(tmp_path / name, QuietPlugin, config={"server.body_timeout_seconds": 7})
    again = await kernel_of(tmp_path / "2", QuietPlugin, config={"server.body_timeout_seconds": 7})
    assert again is not kept


async def test_a_kernel_whose_state_cannot_be_recorded_is_used_once(tmp_path: Path) -> None:
    kernels = {id(await kernel_of(tmp_path / str(n), ThreadPlugin)): n for n in range(4)}
    assert not [booted for booted in booted_kernels._kept.values() if id(booted.kernel) in kernels]


async def test_a_kernel_with_a_thread_that_runs_on_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.testing.booted_kernels.QUIET_TRIES", 5)
    config, release = {"server.body_timeout_seconds": 8}, threading.Event()
    await kernel_of(tmp_path / "1", QuietPlugin, config=config)
    async with make_kernel(tmp_path / "2", plugins=[QuietPlugin], config=config, reuse=True) as kit:
        kit.kernel.threads.submit(release.wait)
        kernel = kit.kernel
    release.set()
    assert await kernel_of(tmp_path / "3", QuietPlugin, config=config) is not kernel


@pytest.fixture
def reuse_kernels() -> bool:
    """Use kernels again."""
    return True


@pytest.mark.parametrize("patches", [False, True])
async def test_a_test_that_has_patched_something_gets_a_new_kernel(
    make_kit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patches: bool
) -> None:
    config = {"server.body_timeout_seconds": 9}
    for name in ("1", "2"):
        url = f"sqlite:///{tmp_path}/{name}.db"
        kept = await kernel_of(tmp_path / name, QuietPlugin, database_url=url, config=config)
    if patches:
        monkeypatch.setattr("corral.kernel.STOP_SECONDS", 5.0)
    kit = await make_kit(plugins=[QuietPlugin], config=config)
    assert (kit.kernel is kept) is not patches
