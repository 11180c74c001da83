"""Where the descriptions of fields come from."""

from __future__ import annotations

import msgspec

from corral_core.plugin_admin.service.openapi_descriptions import describe_field, describe_name


class Base(msgspec.Struct):
    """A thing with `first` and `second`. Its `second` is counted. `first` comes first, before `second`."""

    first: int
    second: int
    title: str


class Heir(Base):
    """`third` begins the docstring."""

    third: int


class Bare(msgspec.Struct):
    title: str
    unheard_of: int


def test_sentences_of_docstrings_come_before_the_glossary() -> None:
    assert describe_field(Base, "first") == "`first` comes first, before `second`."
    assert describe_field(Heir, "second") == "Its `second` is counted."
    assert describe_field(Heir, "third") == "`third` begins the docstring."
    assert describe_field(Bare, "title") == "A short title for people."
    assert describe_field(Bare, "unheard_of") is None


def test_the_glossary_of_the_plugin_comes_before_the_general_one() -> None:
    assert describe_name("config", "corral_plugins.agents.shapes") == "The model parameters and limits of the agent."
    assert describe_name("config", "corral_plugins.tasks.shapes") == "The configuration of the plugin."
    assert describe_name("config", "no_such_package.module") == "The configuration of the plugin."
