"""Which candidates may be served, and which of them is the best: verdicts from what was measured."""

from flows.pipeline import Products, is_candidate
from flows.recipe import Recipe
from tasks.validation import Price
from tasks.validation.benchmarks.measuring import BenchmarkSummary
from tasks.validation.benchmarks.measuring import measured as measured_benchmark
from tasks.validation.cost import measured as measured_cost
from tasks.validation.latency import SpeedSummary
from tasks.validation.latency import measured as measured_speed
from tasks.validation.load import LoadSummary
from tasks.validation.load import measured as measured_load
from tasks.validation.measured import Measured
from tasks.validation.metrics import measured_size
from tasks.validation.quality import QualitySummary
from tasks.validation.quality import measured as measured_quality
from tasks.validation.verdicts import QUIET, Judgement, failed, judge


def speed_of(products: Products) -> SpeedSummary | None:
    """What was measured of all engines' speed, or None if it was not."""
    return SpeedSummary.model_validate(products.speed.metrics) if products.speed else None


def load_of(products: Products) -> LoadSummary | None:
    """What was measured of all engines under load, or None if it was not."""
    return LoadSummary.model_validate(products.load.metrics) if products.load else None


def original_size_bytes(products: Products) -> int:
    """Of the model that candidates are compared with, a checkpoint or a bundle."""
    return int(str(products.original.metrics["size_bytes"]))


def quality_of(products: Products) -> dict[str, QualitySummary]:
    """What was measured of each engine bundle's answers."""
    return {key: QualitySummary.model_validate(stage.metrics) for key, stage in products.quality.items()}


def figures_of(products: Products, price: Price | None = None) -> dict[str, dict[str, Measured]]:
    """What was measured of each engine bundle, whoever measured it, and what it costs at `price`."""
    speed, load, quality = speed_of(products), load_of(products), quality_of(products)
    original_size = original_size_bytes(products)
    found = {}
    for key, bundle in products.bundles.items():
        found[key] = measured_size(bundle.artifact.size_bytes, original_size)
        found[key] |= measured_quality(quality[key]) if key in quality else {}
        for name, stage in products.benchmarks.get(key, {}).items():
            found[key] |= measured_benchmark(name, BenchmarkSummary.model_validate(stage.metrics))
        found[key] |= measured_speed(speed, key) if speed else {}
        found[key] |= measured_load(load, key) if load else {}
        found[key] |= measured_cost(price, found[key]) if price else {}
    return found


def judge_candidates(recipe: Recipe, products: Products) -> dict[str, Judgement]:
    """The verdict on every candidate in every engine; the unchanged model in the same engines is not judged."""
    speed, metrics = speed_of(products), recipe.validation.metrics()
    noise = speed.noise_factors() if speed else QUIET
    judged = {
        key: judge(recipe.validation.limits, figures, metrics, noise=noise)
        for key, figures in figures_of(products, recipe.validation.price_per_hour).items()
        if is_candidate(key)
    }
    return judged | {key: failed(reason) for key, reason in failures(products).items() if is_candidate(key)}


def failures(products: Products) -> dict[str, str]:
    """Why bundles have no figures, in making them or in measuring them."""
    speed, load = speed_of(products), load_of(products)
    return products.failed | (speed.failed if speed else {}) | (load.failed if load else {})


def best(products: Products, judgements: dict[str, Judgement]) -> str | None:
    """The accepted bundle with the least time per output token, or the smallest where speed was not measured."""
    accepted = [key for key, judgement in judgements.items() if judgement.verdict == "ACCEPT"]
    speed = speed_of(products)
    if not accepted:
        return None
    if speed:
        return min(accepted, key=lambda key: speed.subjects[key].tpot_ms.p50.value)
    return min(accepted, key=lambda key: products.bundles[key].artifact.size_bytes)
