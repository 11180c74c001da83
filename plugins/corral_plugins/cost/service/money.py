"""Converts amounts of money, which are stored in whole micro-USD and shown in USD with six decimals.

Half a micro-dollar is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal

MICRO = 1_000_000


def to_micro_usd(usd: Decimal | float) -> int:
    """Convert USD to micro-USD.

    A float is interpreted as its shortest decimal representation, not as its binary value.
    """
    exact = usd if isinstance(usd, Decimal) else Decimal(repr(usd))
    return int((exact * MICRO).to_integral_value(ROUND_HALF_UP))


def to_usd(micro_usd: int) -> float:
    """Convert micro-USD to USD."""
    return micro_usd / MICRO


def cost_of_tokens(items: Iterable[tuple[int, int]]) -> int:
    """Return the total cost of `(tokens, price per million tokens)` pairs. Only the total is rounded."""
    millionths = sum(tokens * price for tokens, price in items)
    return (2 * millionths + MICRO) // (2 * MICRO)
