"""Finds the people mentioned as `@name` in messages and code review comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from corral.events.log import LoggedEvent
from corral_core.accounts.api import Accounts
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.messages.api import Messages

MENTION = "mention"
"""The name that stands for mentions in the setting `notifications.defaults` and in preferences.

It is also the type of notifications about mentions.
"""
MENTIONING = ("message.new", "code_review.commented")
MAX_NAMES = 20
_NAME = re.compile(r"(?<![\w@.+-])@([A-Za-z0-9][\w.+-]{0,63}(?:@[A-Za-z0-9][A-Za-z0-9.-]{0,189})?)")


class Mentions:
    """Finds mentions. The methods run in the caller's unit of work."""

    messages: Messages | None
    code_reviews: CodeReviews | None

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def texts(self, events: Iterable[LoggedEvent]) -> dict[str, str]:
        """Return the texts to which events refer, keyed by event id."""
        ids: dict[str, dict[str, str]] = {name: {} for name in MENTIONING}
        for event in events:
            if event.type in ids:
                data = event.payload()
                ids[event.type][str(data.get("message_id") or data.get("comment_id"))] = event.id
        messages, comments = (ids[name] for name in MENTIONING)
        found: dict[str, str] = {}
        if messages and self.messages is not None:
            found |= {messages[key]: text for key, text in self.messages.texts(messages).items()}
        if comments and self.code_reviews is not None:
            found |= {comments[key]: text for key, text in self.code_reviews.comment_texts(comments).items()}
        return found

    def people(self, names: Mapping[str, set[str]]) -> dict[str, set[str]]:
        """For each key of `names`, return the ids of the people who have one of the names listed under that key."""
        wanted = {name for some in names.values() for name in some}
        found = self._accounts.ids_by_name(wanted) if wanted else {}
        return {key: {each for name in some for each in found.get(name, ())} for key, some in names.items()}


def mentioned_names(text: str) -> set[str]:
    """Return at most 20 names that are mentioned in a text."""
    found: set[str] = set()
    for match in _NAME.finditer(text):
        found.add(match[1].rstrip(".+-").lower())
        if len(found) == MAX_NAMES:
            break
    return found
