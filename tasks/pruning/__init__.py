"""Pruning methods. To add one: a module beside these, and its class in `PruningMethod`."""

from typing import Annotated

from pydantic import Field

from tasks.pruning.magnitude import Magnitude
from tasks.pruning.wanda import Wanda
from tasks.pruning.width import Width

PruningMethod = Annotated[Magnitude | Wanda | Width, Field(discriminator="method")]

__all__ = ["Magnitude", "PruningMethod", "Wanda", "Width"]
