"""How a long computation says how far it is, without knowing who listens."""

from collections.abc import Callable

Report = Callable[[int, int, dict[str, float]], None]
"""Called with (step, total steps, figures at this step); cheap enough to be called at every step."""


def silent(step: int, total: int, metrics: dict[str, float]) -> None:
    """Tell nobody."""
