"""A task's workspace: nothing outside it is read, written or listed, whatever path or link is given."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral_plugins.workers.node.tools import workspace as module
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspace, Workspaces


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return Workspaces(tmp_path / "spaces").open_workspace("task-1")


def test_what_is_written_is_read_and_listed(space: Workspace) -> None:
    assert space.write_text("a/b/c.txt", "Grüße") == {"size_bytes": 7}
    assert space.read_text("./a/b/c.txt") == {"content": "Grüße", "size_bytes": 7, "next_offset": None}
    assert space.list_folder("a/b")["entries"] == [{"name": "c.txt", "type": "file", "size_bytes": 7}]
    space.write_text("a/b/c.txt", "new")
    assert space.read_text("a/b/c.txt")["content"] == "new"
    assert [entry["name"] for entry in space.list_folder("a/b")["entries"]] == ["c.txt"]


def test_long_files_are_read_in_parts_and_no_character_is_cut(space: Workspace) -> None:
    text = "x" + "ü€" * 40_000
    space.write_text("long", text)
    parts, offset = [], 0
    while offset is not None:
        part = space.read_text("long", offset)
        parts.append(part["content"])
        offset = part["next_offset"]
    assert len(parts) > 3
    assert "".join(parts) == text


def test_what_is_not_text_is_read_all_the_same(space: Workspace) -> None:
    (space.path / "raw").write_bytes(b"a\xff\xfeb")
    assert space.read_text("raw")["content"] == "a\ufffd\ufffdb"
    assert space.read_text("raw", 100) == {"content": "", "size_bytes": 4, "next_offset": None}


def test_what_a_full_disk_did_not_take_leaves_nothing(space: Workspace) -> None:
    space.write_text("a.txt", "before")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, usual[1]))
    try:
        with pytest.raises(ToolFailed):
            space.write_text("a.txt", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert space.read_text("a.txt")["content"] == "before"
    assert [entry["name"] for entry in space.list_folder()["entries"]] == ["a.txt"]


def test_names_that_are_not_utf8_are_listed(space: Workspace) -> None:
    Path(os.fsdecode(bytes(space.path) + b"/a\xffb")).touch()
    told = space.list_folder()
    assert [entry["name"] for entry in told["entries"]] == ["a\ufffdb"]
    assert msgspec.json.encode(told)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside/secret", "a/../../outside/secret", "..", "a\0b", "folder/secret", "folder/new"]
)
def test_no_path_leads_out(space: Workspace, path: str) -> None:
    outside = space.path.parent.parent / "outside"
    (space.path / "folder").symlink_to(outside)
    for act in (space.read_text, lambda path: space.write_text(path, "overwritten"), space.list_folder):
        with pytest.raises(ToolFailed):
            act(path)
    assert (outside / "secret").read_text() == "secret"
    assert not (outside / "new").exists()


def test_a_link_is_not_read(space: Workspace) -> None:
    (space.path / "link").symlink_to(space.path.parent.parent / "outside" / "secret")
    (space.path / "folder").symlink_to(space.path.parent.parent / "outside")
    with pytest.raises(ToolFailed, match="links are not followed"):
        space.read_text("link")
    with pytest.raises(ToolFailed, match="links are not followed"):
        space.list_folder("folder")
    assert [entry["type"] for entry in space.list_folder()["entries"]] == ["link", "link"]


def test_writing_replaces_a_link_and_not_what_it_points_to(space: Workspace) -> None:
    outside = space.path.parent.parent / "outside" / "secret"
    (space.path / "link").symlink_to(outside)
    space.write_text("link", "mine")
    assert outside.read_text() == "secret"
    assert not (space.path / "link").is_symlink()
    assert space.read_text("link")["content"] == "mine"


def test_a_link_in_place_of_the_workspace_is_not_followed(space: Workspace, tmp_path: Path) -> None:
    space.path.rmdir()
    space.path.symlink_to(tmp_path / "outside")
    with pytest.raises(ToolFailed):
        space.read_text("secret")


def test_pipes_folders_and_missing_files_are_no_files(space: Workspace) -> None:
    os.mkfifo(space.path / "pipe")
    (space.path / "folder").mkdir()
    for path in ("pipe", "folder", "missing"):
        with pytest.raises(ToolFailed):
            space.read_text(path)
    with pytest.raises(ToolFailed):
        space.write_text("folder", "x")
    with pytest.raises(ToolFailed):
        space.list_folder("missing")
    assert [entry["type"] for entry in space.list_folder()["entries"]] == ["folder", "other"]


def test_limits(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolFailed):
        space.write_text("big", "x" * (module.WRITE_LIMIT + 1))
    monkeypatch.setattr(module, "LIST_LIMIT", 2)
    for name in "abc":
        space.write_text(name, "")
    listed = space.list_folder()
    assert ([entry["name"] for entry in listed["entries"]], listed["truncated"]) == (["a", "b"], True)


@given(path=st.text(alphabet=["a", "b", ".", "/", "\\", "~", "\n", "é"], max_size=12))
def test_any_path_stays_inside(path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any")
    space = Workspaces(root / "spaces").open_workspace("t")
    try:
        space.write_text(path, "x")
    except ToolFailed:
        return
    finally:
        outside = [found for found in root.rglob("*") if found.is_file() and space.path not in found.parents]
        assert outside == []
    assert space.read_text(path)["content"] == "x"


def test_workspaces_are_private_and_go_when_they_are_old(tmp_path: Path) -> None:
    spaces = Workspaces(tmp_path / "spaces")
    old, done = spaces.open_workspace("old"), spaces.open_workspace("done")
    assert old.path.stat().st_mode & 0o077 == 0
    (old.path / "file").write_text("x")
    long_ago = time.time() - module.KEEP_SECONDS - 60
    os.utime(old.path, (long_ago, long_ago))
    spaces.open_workspace("new")
    assert not old.path.exists()
    assert done.path.exists()
    spaces.remove_workspace("done")
    assert not done.path.exists()


@pytest.mark.parametrize("task_id", ["../x", "", "a/b", ".", "x" * 65])
def test_only_ids_name_workspaces(task_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a valid task id"):
        Workspaces(tmp_path).open_workspace(task_id)
