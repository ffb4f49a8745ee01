"""Registered versions to promote: the same small engine, each with a note of its own, so that their bytes differ."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from infra import registry
from infra.artifacts import new_directory, publish
from infra.registry import Version
from infra.tracking import Parent, StageResult, stage_run, start_flow
from tasks.engines import OnnxRuntime
from tasks.engines.compiling import compile_engine

ROOT = Path(__file__).parents[2]
CODE = {"python_model": ROOT / "tasks" / "serving.py", "code_paths": [ROOT / "tasks", ROOT / "infra"]}


def compiled(checkpoint: Path, folder: Path) -> Path:
    """An engine bundle's files."""
    data, out = folder / "data", folder / "bundle"
    data.mkdir()
    out.mkdir()
    np.save(data / "evaluation.npy", np.arange(64, dtype=np.int32)[None])
    compile_engine(checkpoint=checkpoint, data=data, engine=OnnxRuntime(precision="float32"), threads=1, out=out)
    return out


def publish_variant(bundle: Path, note: str, parent: Parent, ballast_bytes: int = 0) -> StageResult:
    """`bundle` with a file more."""
    out = new_directory()
    shutil.copytree(bundle, out, dirs_exist_ok=True)
    (out / "note.txt").write_text(note)
    if ballast_bytes:
        (out / "ballast.bin").write_bytes(np.random.default_rng(len(note)).bytes(ballast_bytes))
    with stage_run(f"compile {note}", parent, params={}) as run:
        return run.finish(publish(out), kind="engine", metrics={}, model=True)


def register(
    model: str, bundle: Path, note: str, parent: Parent, ballast_bytes: int = 0, *, with_code: bool = False
) -> Version:
    """A version of `model` that serves `bundle`.

    Args:
        with_code: as flows register it; else it loads only where this code is imported, and takes a third of the time.
    """
    found = publish_variant(bundle, note, parent, ballast_bytes)
    code = CODE if with_code else {**CODE, "code_paths": []}
    return registry.register(model, bundle=found, parent=parent, verdict="ACCEPT", **code)


def several(bundle: Path) -> Callable[[str, int], None]:
    """Registers so many versions of a model."""

    def make(model: str, count: int) -> None:
        parent = start_flow(model, recipe_json='{"seed": 0}', tags={})
        for number in range(count):
            register(model, bundle, f"{model} {number}", parent)

    return make
