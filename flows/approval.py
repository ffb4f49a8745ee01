"""What an approver fills in on Prefect's page. Not in the flow's file: Prefect may load that twice."""

from typing import Annotated, Literal

from prefect.input import RunInput
from pydantic import Field

Text = Annotated[str, Field(min_length=1)]


class Approval(RunInput):
    """The approver's answer to a request."""

    decision: Literal["approve", "refuse"] = "refuse"
    who: Text
    why: Text
