"""An engine bundle from anywhere, as a stage takes it: whole, checked against its manifest, and runnable here."""

import shutil
from pathlib import Path

from pydantic import Field

from tasks.calibration.checkpoints import TEMPLATES, TOKENIZER_FILES
from tasks.calibration.exported_families import Kind, kind_at
from tasks.calibration.progress import Report, silent
from tasks.engines.card import CARD
from tasks.engines.compiling import CONFIGS, MANIFEST, EngineSummary, runnable, settings_here
from tasks.engines.tuning import Tuned

NOT_OF_THE_ENGINE = (*TOKENIZER_FILES, TEMPLATES, *CONFIGS, CARD, MANIFEST)


class ImportedSummary(EngineSummary):
    """What is known of a bundle that was compiled elsewhere, or earlier."""

    kind: Kind
    tuned: Tuned | None = Field(description="The settings it is loaded with; None: those it was compiled with.")


def import_bundle(*, bundle: Path, out: Path, report: Report = silent) -> ImportedSummary:
    """Copies a bundle into `out`.

    Raises:
        ValueError: it is no bundle, a file was changed or lost, or this machine cannot run it.
    """
    manifest = runnable(bundle, verify=True)
    _, tuned_threads = settings_here(bundle, manifest)
    sizes = {}
    names = [*manifest.files, MANIFEST]
    for step, name in enumerate(names, start=1):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, out / name)
        sizes[name] = (out / name).stat().st_size
        report(step, len(names), {})
    return ImportedSummary(
        status="run",
        why_not_run=None,
        size_bytes=sum(sizes.values()),
        engine_size_bytes=sum(size for name, size in sizes.items() if Path(name).parts[0] not in NOT_OF_THE_ENGINE),
        facts=manifest.facts,
        parity=None,
        kind=kind_at(bundle),
        tuned=None if tuned_threads is None else manifest.tuned,
    )
