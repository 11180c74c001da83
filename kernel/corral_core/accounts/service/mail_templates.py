"""Mail templates: one short plain text for each kind of mail."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any, NamedTuple

from corral import clock

SIGN_OFF = "\n\n-- \nCorral at {site}"
_RESET = "reset it immediately and tell an admin"
_CHANGE = "change your password immediately and tell an admin"


class MailTemplate(NamedTuple):
    """The subject and the text of a mail. Placeholders such as `{name}` are replaced by values."""

    subject: str
    text: str


TEMPLATES: Mapping[str, MailTemplate] = {
    "reset": MailTemplate(
        "Reset your password",
        "Somebody, most likely you, asked to reset the password of {to}.\n\n"
        "Choose a new password within 30 minutes:\n{url}\n\n"
        "The link works once. If you have a second factor, it is still required.\n"
        "If you did not ask for this, ignore this mail: your password stays the same.",
    ),
    "set_password": MailTemplate(
        "Your account is ready",
        "An admin created an account for {to}.\n\nChoose your password within 7 days:\n{url}\n\nThe link works once.",
    ),
    "verify": MailTemplate(
        "Verify your address",
        "An account was created with the address {to}.\n\nConfirm within 24 hours that this is your address:\n{url}\n\n"
        "If you did not create it, ignore this mail: nobody can use the account without this link.",
    ),
    "change_email": MailTemplate(
        "Verify your new address",
        "Somebody, most likely you, asked to change the address of an account to {to}.\n\nConfirm within 24 "
        "hours that this is your address:\n{url}\n\n"
        "If you did not ask for this, ignore this mail.",
    ),
    "invitation": MailTemplate(
        "You are invited",
        "You are invited to create an account ({role}) with the address {to}.\n\nAccept within 7 days:\n{url}\n\n"
        "The link works once.",
    ),
    "address_taken": MailTemplate(
        "You already have an account",
        "Somebody, perhaps you, tried to register with {to}, which already has an account.\n\n"
        "If this was you, sign in, or reset your password if you forgot it.\n"
        "If it was not you, ignore this mail: nobody learned that the account exists.",
    ),
    "locked": MailTemplate(
        "Your account is temporarily locked",
        "There were too many failed attempts to sign in as {to}. It is locked until {until}; existing sessions "
        "continue.\n\nIf these were not your attempts: nobody guessed your password. If you also use it elsewhere, "
        "choose another one.",
    ),
    "password_changed": MailTemplate(
        "Your password was changed",
        f"The password of {{to}} was changed, and all other sessions ended.\n\nIf this was not you, {_RESET}.",
    ),
    "email_changed": MailTemplate(
        "Your address was changed",
        "The address of your account changed from {to} to {new}.\n\nIf this was not you, tell an admin immediately.",
    ),
    "recovery_code_used": MailTemplate(
        "A recovery code was used",
        f"Somebody signed in as {{to}} with a recovery code; {{left}} codes are left.\n\nIf this was not you, "
        f"{_CHANGE}.",
    ),
    "refresh_reuse": MailTemplate(
        "A session was ended for security reasons",
        "A sign-in token of {to} was used twice, which happens when it is copied. The session has ended; sign in again."
        f"\n\nIf you see this more than once, {_CHANGE}.",
    ),
    "mfa_reset": MailTemplate(
        "Your second factor was removed",
        "An admin removed the second factor of {to}, and all sessions ended. Sign in and set up a new second factor."
        "\n\nIf you did not ask for this, tell an admin immediately.",
    ),
    "test": MailTemplate("Test", "This is a test of the mail settings. If you can read it, they are correct."),
}


def write(kind: str, *, sender: str, to: str, site: str, facts: Mapping[str, Any]) -> EmailMessage:
    """Return the message for a kind of mail. `facts`: values of placeholders. Raise `ValueError` for a bad address."""
    template = TEMPLATES[kind]
    message = EmailMessage()
    message["From"] = _address(sender)
    message["To"] = _address(to)
    message["Subject"] = f"Corral: {template.subject}"
    message["Date"] = format_datetime(datetime.fromtimestamp(clock.time_s(), UTC))
    message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"
    message.set_content((template.text + SIGN_OFF).format(**{**facts, "to": to, "site": site}) + "\n")
    return message


def _address(text: str) -> Address:
    """Split an address at the last `@`, so that no part is parsed as another address or as a display name."""
    name, _, domain = text.rpartition("@")
    return Address(username=name, domain=domain)
