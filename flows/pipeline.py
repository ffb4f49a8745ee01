"""What a recipe makes, stage by stage. Read this first.

`pipeline` says which stages there are and what flows between them; the `run` it is given says what to do with each:
run it for real (flows/optimize.py) or only look up whether its result is there already (flows/check.py). So it never
looks inside a result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flows.recipe import Candidate, Recipe
from infra.isolation import StageError
from infra.tracking import StageResult
from tasks.benchmark import ask_original, benchmark_fingerprint, measure_benchmark
from tasks.checkpoint import fingerprint, import_checkpoint
from tasks.compile import compile_engine
from tasks.data import prepare_data
from tasks.distill import distill, recover
from tasks.engines import Engine, label
from tasks.prune import prune
from tasks.quantization import FromSource
from tasks.quantization.mixed import Mixed
from tasks.quantize import quantize, train_quantized
from tasks.sensitivity import measure_sensitivity
from tasks.tpot import measure_tpot
from tasks.tune import tune_engine
from tasks.validate import measure_load, measure_quality, measure_reference, measure_speed
from tasks.validation import Speed
from tasks.validation.energy import Meter
from tasks.validation.gpu_memory import GpuMemory

Run = Callable[..., StageResult]
"""run(task, label, **arguments) -> the stage's result; `label` names the candidate for people."""

ORIGINAL = "original"


@dataclass
class Round:
    """What was measured again of the candidates that were not decided; no windows where the corpus has no more."""

    quality: dict[str, StageResult] = field(default_factory=dict)
    speed: StageResult | None = None


@dataclass
class Products:
    """Everything a recipe makes. Bundles and what was measured of them go by "candidate/engine"."""

    original: StageResult
    data: StageResult
    reference: StageResult | None
    """The original's answers on the evaluation windows; None where no perplexity is measured."""
    checkpoints: dict[str, StageResult] = field(default_factory=dict)
    bundles: dict[str, StageResult] = field(default_factory=dict)
    built_only: dict[str, StageResult] = field(default_factory=dict)
    quality: dict[str, StageResult] = field(default_factory=dict)
    answers: dict[str, StageResult] = field(default_factory=dict)
    """The original's, by the name of the recipe's task."""
    benchmarks: dict[str, dict[str, StageResult]] = field(default_factory=dict)
    """By "candidate/engine", then by the name of the recipe's task."""
    speed: StageResult | None = None
    load: StageResult | None = None
    failed: dict[str, str] = field(default_factory=dict)
    """Why what has no figures has none, by "candidate/engine"."""
    rounds: list[Round] = field(default_factory=list)


def pipeline(recipe: Recipe, run: Run) -> Products:
    """Make and measure every candidate of `recipe`, and the unchanged model in the same engines beside them.

    A candidate whose stage fails is left out and noted; the others go on.

    Raises:
        StageError: what all candidates need failed, or every candidate did.
    """
    products = begin(recipe, import_original(recipe, run), run)
    errors: list[StageError] = []
    for name in (ORIGINAL, *recipe.candidates):
        errors += make(name, recipe, products, run)
    if errors and not any(is_candidate(key) for key in {*products.bundles, *products.built_only} - {*products.failed}):
        raise errors[-1]  # nothing is left that a verdict could be on
    measure_together(recipe, products, run)
    return products


def import_original(recipe: Recipe, run: Run) -> StageResult:
    """The recipe's source as a checkpoint."""
    return run(import_checkpoint, ORIGINAL, source=recipe.source, source_fingerprint=fingerprint(recipe.source))


def make(name: str, recipe: Recipe, products: Products, run: Run) -> list[StageError]:
    """Make one candidate, or the unchanged model, in each of its engines, and measure its answers.

    What was made is added to `products`.

    Returns:
        What ended some of it; noted there too.
    """
    errors: list[StageError] = []
    candidate = Candidate() if name == ORIGINAL else recipe.candidates[name]
    engines = recipe.baseline_engines() if name == ORIGINAL else recipe.engines_of(candidate)
    keys = {f"{name}/{label(engine)}": engine for engine in engines}
    with surviving(products, errors, *keys):
        products.checkpoints[name] = _compress(name, candidate, recipe, products.original, products.data, run)
    for key, engine in keys.items():
        if name in products.checkpoints:
            with surviving(products, errors, key):
                _compile_and_measure(key, products.checkpoints[name], engine, candidate, recipe, products, run)
    return errors


def begin(recipe: Recipe, original: StageResult, run: Run) -> Products:
    """What candidates are compared with: the original's answers on the data."""
    data = run(
        prepare_data,
        "",
        checkpoint=original,
        data=recipe.data,
        data_fingerprint=recipe.data.fingerprint(),
        seed=recipe.seed,
    )
    reference, quality = None, recipe.validation.quality
    if quality:
        reference = run(measure_reference, ORIGINAL, checkpoint=original, data=data, options=quality)
    products = Products(original, data, reference)
    products.answers |= {
        task: run(
            ask_original,
            task,
            checkpoint=original,
            benchmark=benchmark,
            data_fingerprint=benchmark_fingerprint(benchmark),
        )
        for task, benchmark in recipe.validation.tasks.items()
    }
    return products


def measure_together(recipe: Recipe, products: Products, run: Run) -> None:
    """Speed and load of every bundle that is there, side by side."""
    alive = {key: bundle for key, bundle in products.bundles.items() if key not in products.failed}
    if recipe.validation.speed and alive:
        products.speed = time_together("", alive, recipe.validation.speed, products, run)
    if recipe.validation.load and alive:
        products.load = run(measure_load, "", bundles=alive, data=products.data, options=recipe.validation.load)


def is_candidate(key: str) -> bool:
    """Whether "candidate/engine" names a candidate, not the unchanged model."""
    return not key.startswith(f"{ORIGINAL}/")


@contextmanager
def surviving(products: Products, errors: list[StageError], *keys: str) -> Iterator[None]:
    """Within, a stage that fails or crashes ends what it was for, and is noted; the others go on."""
    try:
        yield
    except StageError as error:
        products.failed |= dict.fromkeys(keys, str(error))
        errors.append(error)


def _compile_and_measure(
    key: str,
    checkpoint: StageResult,
    engine: Engine,
    candidate: Candidate,
    recipe: Recipe,
    products: Products,
    run: Run,
) -> None:
    """The engine bundle of a checkpoint, and how well it answers."""
    bundle = run(compile_engine, key, checkpoint=checkpoint, data=products.data, engine=engine)
    if not engine.executable:
        products.built_only[key] = bundle
        return
    if candidate.tune:
        bundle = run(tune_engine, key, bundle=bundle, options=candidate.tune)
    measure_answers(key, bundle, recipe, products, run)


def measure_answers(key: str, bundle: StageResult, recipe: Recipe, products: Products, run: Run) -> None:
    """How well an engine bundle answers."""
    products.bundles[key] = bundle
    if products.reference:
        products.quality[key] = ask(key, bundle, recipe, products.reference, products.data, run)
    products.benchmarks[key] = {
        task: run(
            measure_benchmark,
            f"{key} {task}",
            bundle=bundle,
            reference=products.answers[task],
            benchmark=benchmark,
            timeout_s=60 * recipe.validation.max_minutes_per_candidate,
        )
        for task, benchmark in recipe.validation.tasks.items()
    }


def ask(
    title: str, bundle: StageResult, recipe: Recipe, reference: StageResult, data: StageResult, run: Run
) -> StageResult:
    """Quality of a bundle on the evaluation windows of `data`, which the original answered in `reference`."""
    return run(
        measure_quality,
        title,
        bundle=bundle,
        reference=reference,
        data=data,
        options=recipe.validation.quality,
        timeout_s=60 * recipe.validation.max_minutes_per_candidate,
    )


def time_together(
    title: str, bundles: dict[str, StageResult], options: Speed, products: Products, run: Run
) -> StageResult:
    """Speed of bundles side by side, beside the original, and beside the unchanged model in the same engine."""
    return run(
        measure_speed,
        title,
        bundles=bundles,
        baselines=baselines(bundles),
        original=products.original,
        data=products.data,
        options=options,
        counters=f"energy: {Meter().says}; memory of GPUs: {GpuMemory().says}",
    )


def _compress(
    name: str, candidate: Candidate, recipe: Recipe, original: StageResult, data: StageResult, run: Run
) -> StageResult:
    checkpoint = original
    if candidate.distillation:
        checkpoint = run(distill, name, teacher=checkpoint, data=data, options=candidate.distillation, seed=recipe.seed)
    if candidate.pruning:
        unpruned = checkpoint
        checkpoint = run(prune, name, checkpoint=checkpoint, data=data, method=candidate.pruning)
        if candidate.recovery:
            checkpoint = run(
                recover,
                name,
                checkpoint=checkpoint,
                teacher=unpruned,
                data=data,
                options=candidate.recovery,
                seed=recipe.seed,
            )
    if candidate.quantization:
        unquantized = checkpoint
        method, scores, times = candidate.quantization, None, None
        if not isinstance(method, FromSource) and isinstance(method.weights, Mixed):
            scores = run(
                measure_sensitivity,
                name,
                checkpoint=checkpoint,
                data=data,
                choices=method.weights.choices,
                embedding_choices=method.weights.embedding_choices,
                ignore=method.ignore,
            )
            if method.weights.tpot_ms is not None:
                assert recipe.validation.speed  # the recipe refuses the budget without it, and with more engines
                (engine,) = recipe.engines_of(candidate)
                times = run(
                    measure_tpot,
                    name,
                    checkpoint=checkpoint,
                    data=data,
                    engine=engine,
                    choices=method.weights.choices,
                    tables=method.weights.embedding_choices or (method.embeddings,),
                    ignore=method.ignore,
                    kv_cache=method.kv_cache,
                    options=recipe.validation.speed.model_copy(update={"batch_sizes": (1,)}),
                )
        checkpoint = run(quantize, name, checkpoint=checkpoint, data=data, method=method, scores=scores, times=times)
        if candidate.quantization_training:
            checkpoint = run(
                train_quantized,
                name,
                checkpoint=checkpoint,
                teacher=unquantized,
                data=data,
                options=candidate.quantization_training,
                seed=recipe.seed,
            )
    return checkpoint


def baselines(bundles: dict[str, StageResult]) -> dict[str, str]:
    """For each candidate's bundle, that of the unchanged model in the same engine."""
    found = {key: f"{ORIGINAL}/{key.split('/', 1)[1]}" for key in bundles}
    return {key: baseline for key, baseline in found.items() if baseline in bundles and baseline != key}
