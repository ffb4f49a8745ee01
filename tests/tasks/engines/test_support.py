"""docs/support.md against what happens."""

from pathlib import Path

import pytest

from tasks.engines import TensorRT
from tasks.engines.families import FAMILIES
from tests.tasks.engines import tiny_families
from tests.tasks.engines.support import PRECISIONS, document, line

DOCUMENT = Path(__file__).parents[3] / "docs" / "support.md"
TENSORRT = TensorRT(precision="float16", max_length=64, max_prompt=32, max_batch_size=2)
AGAIN = "run: python -m tests.tasks.engines.support > docs/support.md"


def lines() -> list[str]:
    return [text for text in DOCUMENT.read_text().splitlines() if text.startswith(tuple(f"| {f} |" for f in FAMILIES))]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_line_says_what_happens(family: str, precision: str, tmp_path: Path) -> None:
    assert line(family, precision, tmp_path) in lines(), AGAIN


def test_every_family_and_precision_has_one_line_and_the_rest_is_as_written() -> None:
    assert len(lines()) == len(set(lines())) == len(FAMILIES) * len(PRECISIONS)
    assert DOCUMENT.read_text() == document(lines()), AGAIN


@pytest.mark.skipif(TENSORRT.missing() is not None, reason=TENSORRT.missing() or "TensorRT for RTX is installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_plan_of_every_family_is_built(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_families.save(family, tiny_families.FAMILIES[family], tmp_path / "checkpoint")
    (tmp_path / "bundle").mkdir()
    TENSORRT.compile(checkpoint, tmp_path / "bundle")
    weights_bytes = (checkpoint / "model.safetensors").stat().st_size // 2
    assert (tmp_path / "bundle" / "model.plan").stat().st_size > weights_bytes
