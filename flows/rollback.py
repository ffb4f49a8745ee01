"""The flow that makes an earlier champion the champion again."""

from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.releasing import roll_back
from infra.ledger import Entry


@flow(name="rollback", flow_run_name="rollback-{model}-{version}", validate_parameters=True, persist_result=False)
def rollback(
    model: Annotated[str, Field(min_length=1, examples=["smollm2-135m"])],
    who: Annotated[str, Field(min_length=1)],
    why: Annotated[str, Field(min_length=1)],
    version: Annotated[str, Field(pattern=r"^([1-9]\d*|previous)$")] = "previous",
) -> Entry:
    """Make an earlier champion of a registered model its champion again. Deletes nothing.

    Args:
        model: A registered model.
        who: Who goes back.
        why: What is wrong with the present champion.
        version: Number of an earlier champion, or previous: the one before the present.
    """
    done = roll_back(model, version, who=who, why=why)
    create_markdown_artifact(
        key="release",
        markdown=f"Version {done.version} of {model} is the champion again; {done.replaces} was.",
        description="What serves now",
    )
    return done
