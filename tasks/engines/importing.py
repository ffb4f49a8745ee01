"""An engine bundle from anywhere, as a stage takes it: whole, checked against its manifest, and runnable here."""

import shutil
from pathlib import Path

from tasks.calibration.progress import Report, silent
from tasks.engines.compiling import MANIFEST, EngineSummary, runnable


def import_bundle(*, bundle: Path, out: Path, report: Report = silent) -> EngineSummary:
    """Copies a bundle into `out`.

    Raises:
        ValueError: it is no bundle, a file was changed or lost, or this machine cannot run it.
    """
    manifest = runnable(bundle, verify=True)
    names = [*manifest.files, MANIFEST]
    for step, name in enumerate(names, start=1):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, out / name)
        report(step, len(names), {})
    size_bytes = sum((out / name).stat().st_size for name in names)
    return EngineSummary(
        status="run",
        why_not_run=None,
        size_bytes=size_bytes,
        engine_size_bytes=size_bytes,
        facts=manifest.facts,
        parity=None,
    )
