"""Which candidates may be served, and which of them is the best: verdicts from what was measured."""

from flows.pipeline import ORIGINAL, Products
from flows.recipe import Recipe
from tasks.validation.latency import SpeedSummary
from tasks.validation.limits import Judgement, judge
from tasks.validation.quality import QualitySummary


def speed_of(products: Products) -> SpeedSummary | None:
    """What was measured of all engines' speed, or None if it was not."""
    return SpeedSummary.model_validate(products.speed.metrics) if products.speed else None


def quality_of(products: Products) -> dict[str, QualitySummary]:
    """What was measured of each engine bundle's answers."""
    return {key: QualitySummary.model_validate(stage.metrics) for key, stage in products.quality.items()}


def judge_candidates(recipe: Recipe, products: Products) -> dict[str, Judgement]:
    """The verdict on every candidate's engine bundle; the unchanged model in the same engines is not judged."""
    speed, quality = speed_of(products), quality_of(products)
    return {
        key: judge(
            recipe.validation.limits,
            key,
            quality=quality[key],
            speed=speed,
            size_bytes=bundle.artifact.size_bytes,
        )
        for key, bundle in products.bundles.items()
        if not key.startswith(f"{ORIGINAL}/")
    }


def best(products: Products, judgements: dict[str, Judgement]) -> str | None:
    """The accepted bundle with the least time per output token, or the smallest where speed was not measured."""
    accepted = [key for key, judgement in judgements.items() if judgement.verdict == "ACCEPT"]
    speed = speed_of(products)
    if not accepted:
        return None
    if speed:
        return min(accepted, key=lambda key: speed.subjects[key].tpot_ms.p50.value)
    return min(accepted, key=lambda key: products.bundles[key].artifact.size_bytes)
