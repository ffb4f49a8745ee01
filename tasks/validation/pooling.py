"""Several measurements of the same candidates, taken together: what a first look left undecided was measured on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.validation.latency import Speed, SpeedSummary, Subject, read_groups
from tasks.validation.latency import summarize as summarize_speed
from tasks.validation.quality import QualitySummary
from tasks.validation.quality import summarize as summarize_quality
from tasks.validation.statistics import CONFIDENCE


def pooled_quality(directories: Sequence[Path], *, seed: int, confidence: float = CONFIDENCE) -> QualitySummary:
    """What `measure_quality` said of one candidate on several sets of windows.

    Args:
        directories: what each measurement wrote; no window is in two of them.
        seed: of the bootstrap.
        confidence: of the intervals.
    """
    import pandas as pd

    items = pd.concat([pd.read_parquet(directory / "items.parquet") for directory in directories], ignore_index=True)
    return summarize_quality(items, seed=seed, confidence=confidence)


def pooled_speed(
    measurements: Sequence[tuple[Path, SpeedSummary]],
    baselines: Mapping[str, str],
    options: Speed,
    *,
    confidence: float = CONFIDENCE,
) -> SpeedSummary:
    """What `measure_speed` said in several runs; each subject beside the originals of the runs it took part in.

    Args:
        measurements: what each run wrote and said.
        baselines: for a subject, the one that is the same engine with the unquantized original.
        options: of the first run.
        confidence: of the intervals.
    """
    first = measurements[0][1]
    groups = [group for directory, summary in measurements for group in read_groups(directory, summary)]
    names = dict.fromkeys(name for _, summary in measurements for name in summary.subjects)
    pooled = summarize_speed(
        groups,
        [Subject(name=name, bundle=Path(), baseline=baselines.get(name)) for name in names],
        options,
        threads=first.threads,
        elapsed_s=sum(summary.elapsed_s for _, summary in measurements),
        confidence=confidence,
    )
    failed = {name: reason for _, summary in measurements for name, reason in summary.failed.items()}
    of_first = {name: getattr(first, name) for name in ("machine", "conditions", "energy", "gpu_memory")}
    return pooled.model_copy(update={"failed": failed, **of_first})
