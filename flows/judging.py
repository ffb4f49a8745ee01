"""Which candidates may be served, and which of them is the best: verdicts from what was measured."""

from pydantic import TypeAdapter

from flows.pipeline import Products, baselines, is_candidate
from flows.recipe import Recipe
from infra.artifacts import fetch
from tasks.calibration.exported_families import Kind
from tasks.validation.benchmarks.measuring import BenchmarkSummary
from tasks.validation.benchmarks.measuring import measured as measured_benchmark
from tasks.validation.cost import measured as measured_cost
from tasks.validation.latency import SpeedSummary
from tasks.validation.latency import measured as measured_speed
from tasks.validation.load import LoadSummary
from tasks.validation.load import measured as measured_load
from tasks.validation.measured import Measured
from tasks.validation.metrics import measured_size
from tasks.validation.plausibility import implausibly_fast
from tasks.validation.pooling import pooled_quality, pooled_speed
from tasks.validation.quality import QualitySummary
from tasks.validation.quality import measured as measured_quality
from tasks.validation.statistics import CONFIDENCE
from tasks.validation.verdicts import QUIET, Judgement, failed, judge


def speed_of(products: Products) -> SpeedSummary | None:
    """What was measured of all engines' speed in the first measurement, or None if it was not."""
    return SpeedSummary.model_validate(products.speed.metrics) if products.speed else None


def load_of(products: Products) -> LoadSummary | None:
    """What was measured of all engines under load, or None if it was not."""
    return LoadSummary.model_validate(products.load.metrics) if products.load else None


def original_size_bytes(products: Products) -> int:
    """Of the model that candidates are compared with, a checkpoint or a bundle."""
    return int(str(products.original.metrics["size_bytes"]))


def kind_of_original(products: Products) -> Kind:
    """What the models of a run do."""
    return TypeAdapter(Kind).validate_python(products.original.metrics["kind"])


def speed_of_all(recipe: Recipe, products: Products, confidence: float = CONFIDENCE) -> SpeedSummary | None:
    """What all measurements together say of the engines' speed."""
    stages = [products.speed, *(again.speed for again in products.rounds)]
    measurements = [(fetch(s.artifact), SpeedSummary.model_validate(s.metrics)) for s in stages if s]
    options = recipe.validation.speed
    if not measurements or options is None:
        return None
    if len(measurements) == 1 and confidence == CONFIDENCE:
        return measurements[0][1]
    return pooled_speed(measurements, baselines(products.bundles), options, confidence=confidence)


def quality_of_all(recipe: Recipe, products: Products, confidence: float = CONFIDENCE) -> dict[str, QualitySummary]:
    """What all measurements together say of each engine bundle's answers."""
    found: dict[str, QualitySummary] = {}
    options = recipe.validation.quality
    if options is None:
        return found
    for key, stage in products.quality.items():
        stages = [stage, *(again.quality[key] for again in products.rounds if key in again.quality)]
        if len(stages) == 1 and confidence == CONFIDENCE:
            found[key] = QualitySummary.model_validate(stage.metrics)
        else:
            paths = [fetch(each.artifact) for each in stages]
            found[key] = pooled_quality(paths, seed=options.seed, confidence=confidence)
    return found


def figures_of(recipe: Recipe, products: Products, confidence: float = CONFIDENCE) -> dict[str, dict[str, Measured]]:
    """What was measured of each engine bundle, whoever measured it, and what it costs at the recipe's price."""
    speed, quality = speed_of_all(recipe, products, confidence), quality_of_all(recipe, products, confidence)
    load, price = load_of(products), recipe.validation.price_per_hour
    original_size = original_size_bytes(products)
    found = {}
    for key, bundle in products.bundles.items():
        found[key] = measured_size(bundle.artifact.size_bytes, original_size)
        looked_at = {
            **(measured_quality(quality[key]) if key in quality else {}),
            **(measured_speed(speed, key) if speed else {}),
        }
        found[key] |= {name: its.model_copy(update={"confidence": confidence}) for name, its in looked_at.items()}
        for name, stage in products.benchmarks.get(key, {}).items():
            found[key] |= measured_benchmark(name, BenchmarkSummary.model_validate(stage.metrics))
        found[key] |= measured_load(load, key) if load else {}
        found[key] |= measured_cost(price, found[key]) if price else {}
    return found


def judge_candidates(recipe: Recipe, products: Products) -> dict[str, Judgement]:
    """The verdict on every candidate in every engine; the unchanged model in the same engines is not judged.

    The first look and every later one use intervals of the same confidence, so that all looks together err as seldom
    as one at 95 %.
    """
    confidence = recipe.validation.if_inconclusive.confidence
    speed, metrics = speed_of_all(recipe, products), recipe.validation.metrics()
    noise = speed.noise_factors() if speed else QUIET
    judged = {
        key: judge(
            recipe.validation.limits,
            figures,
            metrics,
            noise=noise,
            anomalies=_too_fast(key, products, speed),
        )
        for key, figures in figures_of(recipe, products, confidence).items()
        if is_candidate(key)
    }
    return judged | {key: failed(reason) for key, reason in failures(products).items() if is_candidate(key)}


def _too_fast(key: str, products: Products, speed: SpeedSummary | None) -> list[str]:
    """A sentence if a candidate decodes faster than the machine reads its weights.

    Of its files, a token may leave the embedding table unread but for a row, in float32 at most.
    """
    subject = speed.subjects.get(key) if speed else None
    if subject is None or speed is None or speed.machine is None or "tensorrt" in key.split("/", 1)[1]:
        return []
    files, about = products.bundles[key].metrics, products.original.metrics
    if subject.tpot_ms is None or about.get("kind") != "decoder":  # not all weights are read for each token
        return []
    known = (files.get("engine_size_bytes"), about.get("vocab_size"), about.get("hidden_size"))
    if None in known:  # a bundle of elsewhere, or compared with one
        return []
    size_bytes, vocab_size, hidden_size = (int(str(value)) for value in known)
    weight_bytes = size_bytes - 4 * vocab_size * hidden_size
    sentence = implausibly_fast(subject.tpot_ms, weight_bytes, speed.machine)
    return [sentence] if sentence else []


def failures(products: Products) -> dict[str, str]:
    """Why bundles have no figures, in making them or in measuring them."""
    found, load = dict(products.failed), load_of(products)
    for stage in (products.speed, *(again.speed for again in products.rounds)):
        found |= SpeedSummary.model_validate(stage.metrics).failed if stage else {}
    return found | (load.failed if load else {})


def best(products: Products, judgements: dict[str, Judgement]) -> str | None:
    """The accepted bundle with the least time per output token, or the smallest where speed was not measured.

    Of encoders, which write none, that with the least latency.
    """
    accepted = [key for key, judgement in judgements.items() if judgement.verdict == "ACCEPT"]
    speed = speed_of(products)
    if not accepted:
        return None
    if speed:
        return min(accepted, key=lambda key: speed.subjects[key].time_ms.p50.value)
    return min(accepted, key=lambda key: products.bundles[key].artifact.size_bytes)
