"""The flow that makes room: a schedule starts it, and so does `slimline retention`."""

from datetime import timedelta
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from infra.retention import Unneeded, delete, unneeded


@flow(name="retention", validate_parameters=True, persist_result=False)
def retention(older_than_days: Annotated[float, Field(ge=1)] = 30.0, dry_run: bool = True) -> list[Unneeded]:
    """Delete runs and artifacts that are old and that no registered version or ledger entry leads to.

    Args:
        older_than_days: What is younger stays.
        dry_run: Only say what would be deleted.
    """
    found, said = make_room(older_than_days, dry_run=dry_run)
    create_markdown_artifact(key="retention", markdown=said, description="What nobody needs any more")
    return found


def make_room(older_than_days: float, *, dry_run: bool) -> tuple[list[Unneeded], str]:
    """What is old and unneeded, and a sentence about it; unless it is a dry run it is gone."""
    older_than = timedelta(days=older_than_days)
    found = unneeded(older_than)
    counts = {what: sum(each.what == what for each in found) for what in ("run", "artifact")}
    what = f"{counts['run']} flow runs and {counts['artifact']} artifacts"
    said = f"{what} are unneeded and older than {older_than_days:g} days"
    if dry_run:
        mib = sum(each.size_bytes for each in found) / 2**20
        return found, f"{said}, of {mib:,.1f} MiB. Nothing was deleted."
    return found, f"{said}: deleted, {delete(found, older_than) / 2**20:,.1f} MiB."
