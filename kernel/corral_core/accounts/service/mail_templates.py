"""Mail templates: short plain texts, one for each kind of mail."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any, NamedTuple

from corral import clock

SIGN_OFF = "\n\n-- \nCorral at {site}"
_NOT_YOU = "If this was not you, {remedy}."
_ASK = "change your password at once and tell an admin"


class Letter(NamedTuple):
    """Subject and text; `{name}` stands for a fact."""

    subject: str
    text: str


LETTERS: Mapping[str, Letter] = {
    "reset": Letter(
        "Reset your password",
        "Somebody, most likely you, asked to reset the password of {to}.\n\n"
        "Choose a new one within 30 minutes:\n{url}\n\n"
        "The link works once. Your second factor, if you have one, is still asked for.\n"
        "If you did not ask for this, do nothing: your password stays as it is.",
    ),
    "set_password": Letter(
        "Your account is ready",
        "An admin has made an account for {to}.\n\nChoose your password within 7 days:\n{url}\n\nThe link works once.",
    ),
    "verify": Letter(
        "Verify your address",
        "An account was made with the address {to}.\n\nConfirm within 24 hours that it is yours:\n{url}\n\n"
        "If you did not make it, do nothing: nobody can use it without this link.",
    ),
    "change_email": Letter(
        "Verify your new address",
        "An account is to move to the address {to}.\n\nConfirm within 24 hours that it is yours:\n{url}\n\n"
        "If you did not ask for this, do nothing.",
    ),
    "invitation": Letter(
        "You are invited",
        "You are invited to make an account ({role}) with the address {to}.\n\nAccept within 7 days:\n{url}\n\n"
        "The link works once.",
    ),
    "address_taken": Letter(
        "You have an account already",
        "Somebody, perhaps you, tried to register with {to}, which has an account already.\n\n"
        "If this was you, sign in, or reset your password if you forgot it.\n"
        "If it was not, there is nothing to do: nobody learned that the account exists.",
    ),
    "locked": Letter(
        "Your account is locked for a while",
        "There were too many failed attempts to sign in as {to}. It is locked until {until}; open sessions go on."
        "\n\nIf these were not your attempts, your password held. Choose a stronger one if it is used elsewhere too.",
    ),
    "password_changed": Letter(
        "Your password was changed",
        f"The password of {{to}} was changed, and all other sessions ended.\n\n{_NOT_YOU.format(remedy='reset it at once and tell an admin')}",  # noqa: E501
    ),
    "email_changed": Letter(
        "Your address was changed",
        f"The account of {{to}} has another address now: {{new}}.\n\n{_NOT_YOU.format(remedy='tell an admin at once')}",
    ),
    "recovery_code_used": Letter(
        "A recovery code was used",
        f"Somebody signed in as {{to}} with a recovery code; {{left}} are left.\n\n{_NOT_YOU.format(remedy=_ASK)}",
    ),
    "refresh_reuse": Letter(
        "A session was ended for safety",
        "A sign-in token of {to} was used twice, as happens when it is copied. The session has ended; sign in again."
        f"\n\nIf you see this more than once, {_ASK}.",
    ),
    "mfa_reset": Letter(
        "Your second factor was removed",
        "An admin has removed the second factor of {to}, and all sessions ended. Sign in and set up a new one."
        "\n\nIf you did not ask for this, tell an admin at once.",
    ),
    "test": Letter("Test", "This is a test of the mail settings. It has arrived."),
}


def write(kind: str, *, sender: str, to: str, site: str, facts: Mapping[str, Any]) -> EmailMessage:
    """The mail of a kind. Raises `ValueError` for an address that no mail can be written to."""
    letter = LETTERS[kind]
    message = EmailMessage()
    message["From"] = _address(sender)
    message["To"] = _address(to)
    message["Subject"] = f"Corral: {letter.subject}"
    message["Date"] = format_datetime(datetime.fromtimestamp(clock.time_s(), UTC))
    message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"
    message.set_content((letter.text + SIGN_OFF).format(**{**facts, "to": to, "site": site}) + "\n")
    return message


def _address(text: str) -> Address:
    """Its parts as they are: nothing of it is read as a second address or as a name."""
    name, _, domain = text.rpartition("@")
    return Address(username=name, domain=domain)
