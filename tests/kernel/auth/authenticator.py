"""An authenticator app: RFC 6238 in a few lines, so that the product is not held against its own library."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct

from corral import clock


class AuthenticatorApp:
    """Gives codes for a seed."""

    def __init__(self, secret: str) -> None:
        self.key = base64.b32decode(secret)

    def code(self, steps: int = 0) -> str:
        """The code of now, or of so many steps later."""
        step = int(clock.time_s()) // 30 + steps
        mac = hmac.new(self.key, struct.pack(">Q", step), hashlib.sha1).digest()
        at = mac[-1] & 15
        number = struct.unpack(">I", mac[at : at + 4])[0] & 0x7FFFFFFF
        return f"{number % 1_000_000:06d}"

    def wrong(self) -> str:
        """A code that is of no step near now."""
        near = {self.code(steps) for steps in range(-3, 4)}
        return next(code for number in range(20) if (code := f"{number:06d}") not in near)
