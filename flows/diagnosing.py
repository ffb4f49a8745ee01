"""Ask why, where a candidate is slower or worse than it should be."""

from collections.abc import Mapping

from flows.judging import speed_of
from flows.pipeline import Products, Run
from flows.recipe import Recipe
from infra.isolation import StageError
from tasks.diagnose import diagnose
from tasks.validation.diagnosis import Diagnosis, Facts, Speeds, explain
from tasks.validation.latency import SpeedSummary
from tasks.validation.measured import Aspect, Metric, metric_of
from tasks.validation.verdicts import Judgement


def diagnose_candidates(
    recipe: Recipe, products: Products, judgements: Mapping[str, Judgement], run: Run
) -> dict[str, Diagnosis]:
    """The reasons, for every judged bundle that is slower than what it was made from or keeps a limit not surely.

    A diagnosis that fails is told and left out: it must not cost the verdicts.
    """
    speed, metrics = speed_of(products), recipe.validation.metrics()
    found = {}
    for key, judgement in judgements.items():
        if key not in products.bundles or judgement.failure:
            continue
        slower, worse = is_slower(key, judgement, metrics, speed), is_worse(judgement, metrics)
        if not slower and not worse:
            continue
        checkpoint = products.checkpoints.get(key.split("/", 1)[0])
        original = products.original if products.original.kind == "checkpoint" else None
        given = {"bundle": products.bundles[key], "checkpoint": checkpoint, "original": original, "data": products.data}
        try:
            facts = Facts.model_validate(run(diagnose, key, **given).metrics)
        except StageError:
            continue
        found[key] = explain(facts, _speeds(key, speed), slower=slower, worse=worse)
    return found


def is_slower(key: str, judgement: Judgement, metrics: Mapping[str, Metric], speed: SpeedSummary | None) -> bool:
    """Whether a limit on speed is not surely kept, or less comes out per second than of what it was made from."""
    if _unsure(judgement, metrics, "speed"):
        return True
    subject = speed.subjects.get(key) if speed else None
    if subject is None:
        return False
    return any((at.ratio_to_baseline or at.ratio_to_original).value < 1 for at in subject.throughput.values())


def is_worse(judgement: Judgement, metrics: Mapping[str, Metric]) -> bool:
    """Whether a limit on answers is not surely kept."""
    return _unsure(judgement, metrics, "quality")


def _unsure(judgement: Judgement, metrics: Mapping[str, Metric], aspect: Aspect) -> bool:
    return any(
        metrics[metric_of(check.figure, metrics)].aspect == aspect
        for check in judgement.checks
        if check.verdict != "ACCEPT" and check.measured is not None
    )


def _speeds(key: str, speed: SpeedSummary | None) -> Speeds | None:
    subject = speed.subjects.get(key) if speed else None
    if speed is None or subject is None or subject.tpot_ms is None or subject.ttft_ms is None:
        return None
    return Speeds(
        tpot_ms=subject.tpot_ms.p50.value,
        ttft_ms=subject.ttft_ms.p50.value,
        prompt_tokens=speed.prompt_tokens,
        machine=speed.machine,
    )
