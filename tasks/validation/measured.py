"""What a measurement says about one metric of one candidate: its value, and how much worse than the original it is.

Quality, speed, load and task metrics all report in these terms, so that any of them can be limited, shown and compared
in the same way.
"""

from typing import Literal

from pydantic import BaseModel, Field

from tasks.validation.statistics import Estimate

Better = Literal["lower", "higher"]


class Metric(BaseModel, frozen=True, extra="forbid"):
    """A kind of figure, whoever measures it."""

    name: str = Field(description="As recipes and MLflow write it, units included: tpot_ms.")
    title: str = Field(description="As people read it.")
    unit: str = Field(description='"" for a plain number or a fraction.')
    better: Better


class Measured(BaseModel, frozen=True, extra="forbid"):
    """One metric of one candidate; intervals are 95 %."""

    value: Estimate
    original: float | None = Field(None, description="The same figure of the original; None: it has none, as agreement.")
    degradation: Estimate | None = Field(
        None, description="How much worse than the original, in the metric's unit, paired; negative: better."
    )
    degradation_percent: Estimate | None = Field(None, description="The same in percent of the original's figure.")
