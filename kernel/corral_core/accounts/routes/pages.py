"""Web pages on which people who open a link set a password, verify an email address or accept an invitation.

The token is in the fragment of the link. Browsers do not send fragments, so the token appears in no log and in no
`Referer` header. A script copies the token into the form; without scripts, the person pastes the link. The forms use
the same services as the JSON endpoints. Forms that contain a password count towards the rate limit for sign-ins. A
rejected form is shown again with the reason.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from corral.auth.principal import PUBLIC
from corral.database.engine import Work
from corral.errors import Problem
from corral.http.answers import Request, Response, Text
from corral.http.routes import Routes
from corral_core.accounts.api import FullName, Password
from corral_core.accounts.routes.auth import SIGN_IN_RATE
from corral_core.accounts.service.links import SingleUseLinks
from corral_core.accounts.service.passwords import PasswordPolicy
from corral_core.accounts.service.recovery import PasswordRecovery
from corral_core.accounts.service.registration import AccountRegistration

BODY_LIMIT = 16 * 1024
HTML = "text/html; charset=utf-8"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {"Content-Security-Policy": PAGE_POLICY}


def problem_page(problem: Problem, request: Request | None) -> Response | None:
    """Return a page that shows the problem, or None if the client does not ask for HTML."""
    if request is None or "text/html" not in (request.header("accept") or ""):
        return None
    labels = {f"/{each.name}": each.label for page in (SET_PASSWORD, VERIFY, ACCEPT) for each in page.inputs}
    faults = [f"{labels.get(each.pointer, each.pointer[1:])}: {each.detail}" for each in problem.errors]
    faults = faults or [problem.detail]
    content = _alerts(faults) + "<p>Go back to the previous page to try again.</p>"
    headers = {**problem.headers, **HEADERS, "Cache-Control": "no-store"}
    return Response(problem.status, _html(problem.title, content).encode(), headers, HTML)


routes = Routes("/account", tag="Pages", no_store=True, root=True, explain=problem_page)

PastedLink = Annotated[str, Meta(min_length=1, max_length=2000)]


class PasswordForm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new password, and either the token from a link for setting a password or the whole link."""

    token: PastedLink
    new_password: Password


class TokenForm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either the token from the verification link or the whole link."""

    token: PastedLink


class InvitationForm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name and the password for a new account, and either the token from the invitation link or the whole link."""

    token: PastedLink
    full_name: FullName
    password: Password


class FormInput(NamedTuple):
    """An input field of a form."""

    name: str
    label: str
    attributes: str
    hint: str = ""


class Page(NamedTuple):
    """A page with one form. `done` is the text that the page shows after the form has been accepted."""

    title: str
    inputs: Sequence[FormInput]
    button: str
    done: str


TOKEN = FormInput(
    "token",
    "Link",
    'autocomplete="off" spellcheck="false"',
    "Paste the link that you opened. If JavaScript is enabled, the browser fills it in.",
)
NEW_PASSWORD = FormInput("new_password", "New password", 'type="password" autocomplete="new-password" maxlength="128"')
SET_PASSWORD = Page(
    "Choose a password", (TOKEN, NEW_PASSWORD), "Save", "Your password was saved. You can sign in with it now."
)
VERIFY = Page("Verify your address", (TOKEN,), "Verify", "Your address is verified. You can sign in now.")
ACCEPT = Page(
    "Create your account",
    (
        TOKEN,
        FormInput("full_name", "Your name", 'autocomplete="name" maxlength="200"'),
        FormInput("password", "Password", 'type="password" autocomplete="new-password" maxlength="128"'),
    ),
    "Create account",
    "Your account was created. You can sign in now.",
)


@routes.get("/reset-password", needs=PUBLIC)
async def show_password_reset(policy: PasswordPolicy) -> Text:
    """Show the form on which a person who opened a link sets a new password."""
    return _form(_with_password_hint(SET_PASSWORD, policy))


@routes.post("/reset-password", needs=PUBLIC, rate=SIGN_IN_RATE, form=True, keyed=False, body_limit=BODY_LIMIT)
async def submit_password_reset(
    body: PasswordForm, request: Request, recovery: PasswordRecovery, links: SingleUseLinks, policy: PasswordPolicy
) -> Text:
    """Set a new password with the token from a link, and show the result as a page."""
    token = _token_of(body.token)
    return await _submit_form(
        _with_password_hint(SET_PASSWORD, policy),
        body,
        links.base_url,
        lambda: recovery.set_password(token, body.new_password, request.unit_context()),
    )


@routes.get("/verify-email", needs=PUBLIC)
async def show_verification() -> Text:
    """Show the form on which a person who opened a link verifies an email address."""
    return _form(VERIFY)


@routes.post("/verify-email", needs=PUBLIC, form=True, keyed=False, body_limit=BODY_LIMIT)
async def submit_verification(
    body: TokenForm, request: Request, registrations: AccountRegistration, links: SingleUseLinks, work: Work
) -> Text:
    """Verify an email address with the token from a link, and show the result as a page."""
    token = _token_of(body.token)
    entry = request.unit_context()
    return await _submit_form(
        VERIFY, body, links.base_url, lambda: work(lambda: registrations.verify_address(token), entry=entry)
    )


@routes.get("/accept-invitation", needs=PUBLIC)
async def show_invitation(policy: PasswordPolicy) -> Text:
    """Show the form for creating an account with an invitation."""
    return _form(_with_password_hint(ACCEPT, policy))


# Unlike registration, it sends no mail and needs the token of a link, so an office behind one address accepts many.
@routes.post("/accept-invitation", needs=PUBLIC, rate=SIGN_IN_RATE, form=True, keyed=False, body_limit=BODY_LIMIT)
async def submit_invitation(
    body: InvitationForm,
    request: Request,
    registrations: AccountRegistration,
    links: SingleUseLinks,
    policy: PasswordPolicy,
) -> Text:
    """Create an account with an invitation, and show the result as a page."""
    token, entry = _token_of(body.token), request.unit_context()
    return await _submit_form(
        _with_password_hint(ACCEPT, policy),
        body,
        links.base_url,
        lambda: registrations.accept_invitation(token, body.full_name, body.password, entry),
    )


@routes.get("/page.css", needs=PUBLIC)
async def read_page_style() -> Text:
    """Return the style sheet for the pages."""
    return Text(_static_file("page.css"), "text/css; charset=utf-8")


@routes.get("/page.js", needs=PUBLIC)
async def read_page_script() -> Text:
    """Return the script for the pages."""
    return Text(_static_file("page.js"), "text/javascript; charset=utf-8")


async def _submit_form(page: Page, body: msgspec.Struct, url: str, submit: Callable[[], Awaitable[object]]) -> Text:
    """Submit the form and return the page with the result, or with the form again and the reason for its rejection.

    A form that is shown again contains the entered values, except the password.
    """
    try:
        await submit()
    except Problem as problem:
        if problem.status >= 500:
            raise
        faults = [*dict.fromkeys(each.detail for each in problem.errors)] or [problem.detail]
        entered = {name: value for name, value in msgspec.structs.asdict(body).items() if "password" not in name}
        return _form(page, faults, entered)
    command = f"<p>On the command line: <code>corral login {html.escape(url)}</code></p>"
    return _page(page.title, f'<p role="status">{html.escape(page.done)}</p>\n{command}')


def _with_password_hint(page: Page, policy: PasswordPolicy) -> Page:
    """Return the page with the minimum password length shown below the password field."""
    hint = f"At least {policy.current_rules()['min_length']} characters."
    return page._replace(inputs=[each._replace(hint=hint) if "password" in each.name else each for each in page.inputs])


def _form(page: Page, faults: Sequence[str] = (), entered: Mapping[str, str] = {}) -> Text:
    inputs = "".join(_input(each, entered.get(each.name, "")) for each in page.inputs)
    return _page(
        page.title,
        f'{_alerts(faults)}<form method="post">\n{inputs}<button>{html.escape(page.button)}</button>\n</form>',
    )


def _input(each: FormInput, value: str) -> str:
    hint = f'<p class="soft" id="{each.name}-hint">{html.escape(each.hint)}</p>' if each.hint else ""
    described = f' aria-describedby="{each.name}-hint"' if each.hint else ""
    filled = f' value="{html.escape(value)}"' if value else ""
    return (
        f'<div class="{each.name}"><label for="{each.name}">{html.escape(each.label)}</label>'
        f'<input id="{each.name}" name="{each.name}" required {each.attributes}{filled}{described}>{hint}</div>\n'
    )


def _alerts(faults: Sequence[str]) -> str:
    return "".join(f'<p role="alert">{html.escape(fault)}</p>\n' for fault in faults)


def _page(title: str, content: str) -> Text:
    return Text(_html(title, content), HTML, HEADERS)


def _html(title: str, content: str) -> str:
    return Template(_static_file("page.html")).substitute(title=html.escape(title), content=content)


def _token_of(pasted: str) -> str:
    """Return the token from the entered text, which may be the token or the whole link."""
    return pasted.strip().rpartition("token=")[2]


@functools.cache
def _static_file(name: str) -> str:
    return resources.files("corral_core.accounts").joinpath("pages", name).read_text("utf-8")
