"""How far a stage is, on the page of its flow run in Prefect."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


@contextmanager
def page_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Within, call the value with a step and their number; the stage's progress artifact follows it.

    Only where a Prefect server has a page, and only for stages that take longer than `INTERVAL_S`. A server that does
    not take it disturbs no stage.
    """
    from prefect.context import TaskRunContext
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value() or TaskRunContext.get() is None:
        yield lambda step, total: None
        return

    artifact: UUID | None = None
    told_at = time.monotonic()

    def tell(percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        nonlocal artifact, told_at
        told_at = time.monotonic()
        try:
            if artifact is None:
                key = re.sub("[^a-z0-9]+", "-", f"progress {title}".lower()).strip("-")
                artifact = create_progress_artifact(percent, key=key, description=title)  # type: ignore[assignment]
            else:
                update_progress_artifact(artifact, progress=percent)
        except Exception as error:  # noqa: BLE001
            logger.warning("Prefect's page does not show how far %s is: %s", title, error)

    def show(step: int, total: int) -> None:
        if time.monotonic() - told_at >= INTERVAL_S:
            tell(100 * min(step / total, 1) if total else 0)

    yield show
    if artifact is not None:
        tell(100)
