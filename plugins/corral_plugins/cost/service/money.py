"""Money is integer micro-USD inside and USD with six places outside; halves round up."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal

MICRO = 1_000_000


def micro(usd: Decimal | float) -> int:
    """USD as micro-USD; what a float shows counts, not its binary tail."""
    exact = usd if isinstance(usd, Decimal) else Decimal(repr(usd))
    return int((exact * MICRO).to_integral_value(ROUND_HALF_UP))


def usd(micro_usd: int) -> float:
    """Micro-USD as USD: the shortest decimal, so never more than six places."""
    return micro_usd / MICRO


def per_million(parts: Iterable[tuple[int, int]]) -> int:
    """The sum of tokens at their prices for a million of them, rounded once."""
    millionths = sum(tokens * price for tokens, price in parts)
    return (2 * millionths + MICRO) // (2 * MICRO)
