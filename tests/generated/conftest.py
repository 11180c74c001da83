"""The world of the generated tests, on each engine."""

from tests.generated.fixtures import make_world, world

__all__ = ["make_world", "world"]
