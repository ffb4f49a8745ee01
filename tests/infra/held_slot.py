"""A flow that holds a slot of a concurrency limit, for the tests of production."""

import time

from prefect import flow
from prefect.concurrency.sync import concurrency


@flow
def hold(limit: str = "gpu-sm90", seconds: float = 300.0) -> None:
    """Hold one slot."""
    with concurrency(limit, strict=True, raise_on_lease_renewal_failure=False):
        time.sleep(seconds)
