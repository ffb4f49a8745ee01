"""Float graphs of tiny models, each exported once: an export takes seconds, what is made of it does not."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tasks.engines.exported import export_graphs
from tasks.engines.exported_graph import ExportedGraph, Pooling, missing
from tasks.quantization.exported_checkpoint import ExportedCheckpoint, read_checkpoint


class Exported(NamedTuple):
    checkpoint: Path
    source: ExportedCheckpoint
    graphs: dict[str, ExportedGraph]


@pytest.fixture(scope="session")
def exported(transformer_checkpoint: Callable[[str], Path]) -> Callable[..., Exported]:
    """Exports the tiny model of a class of transformers."""
    if problem := missing():
        pytest.skip(problem)

    @functools.cache
    def export(class_name: str, pooling: Pooling | None) -> Exported:
        checkpoint = transformer_checkpoint(class_name)
        source = read_checkpoint(checkpoint)
        return Exported(checkpoint, source, export_graphs(source, pooling))

    return lambda class_name, pooling=None: export(class_name, pooling)
