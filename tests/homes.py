"""A home of the tests' own for what runs in their process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.settings import settings


@contextmanager
def home_at(where: Path) -> Iterator[Path]:
    """Within, `where` is the home of this process and of those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMLINE_HOME", str(where))
        settings.cache_clear()
        yield where
    settings.cache_clear()
