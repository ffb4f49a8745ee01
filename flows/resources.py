"""What the stages of a recipe ask of their machine: cores, memory, a GPU, or to be alone on it."""

from collections.abc import Iterator
from typing import Any

from flows.recipe import Candidate, Recipe
from infra.hardware import hardware
from infra.settings import settings
from infra.slots import Needs
from tasks.engines import Engine
from tasks.quantization import FromSource
from tasks.quantization.mixed import Mixed
from tasks.quantization.token_times import pairs_to_time

FLOAT32_BYTES = 4
ON_GPU = ("tensorrt",)
"""Engines that hold their weights there."""
TRAINING = ("distill", "recover", "train-quantized")
"""Stages that train, on a GPU where there is one."""
TIMED = ("measure-speed", "measure-load", "measure-tpot", "tune")
"""Stages whose figures another stage on the same machine would spoil."""
ONE_CORE = ("import-checkpoint", "import-bundle", "prepare-data", "more-windows")
TRAINING_BYTES_PER_STUDENT_PARAMETER = 16
"""float32 weights, gradients and two Adam moments."""
PROCESS_MIB = 600
"""What Python, torch and transformers take before any weight; measured, torch 2.13 on Linux."""


def needs(stage: str, title: str, arguments: dict[str, Any], memory_mib: float | None = None) -> Needs:
    """What a stage asks for.

    Args:
        stage: the name of its task.
        title: names the candidate and its engine.
        arguments: of its task; `bundles` has names like the title.
        memory_mib: an estimate.
    """
    names = [title, *arguments.get("bundles", {})]
    if engine := arguments.get("engine"):
        names.append(f"/{engine.engine}")
    on_gpu_engine = any(f"/{engine}" in name for name in names for engine in ON_GPU)
    return Needs(
        cores=1 if stage in ONE_CORE else settings().num_threads,
        gpu=on_gpu_engine or (stage in TRAINING and bool(hardware()["gpus"])),
        alone=stage in TIMED,
        memory_mib=memory_mib,
    )


def memory_mib(recipe: Recipe, num_parameters: int) -> dict[str, float]:
    """Estimated peak of stages in MiB by the name of their task, "" for all others; activations come on top of it."""
    model_mib = num_parameters * FLOAT32_BYTES / 2**20
    candidates = recipe.candidates.values()
    found = {"": PROCESS_MIB + 2 * model_mib}  # import, pruning, compiling, training scales: the model and a copy
    student = PROCESS_MIB + model_mib + num_parameters * TRAINING_BYTES_PER_STUDENT_PARAMETER / 2**20
    if any(c.distillation for c in candidates):
        found["distill"] = student
    if any(c.recovery for c in candidates):
        found["recover"] = student
    if any(c.quantization_training and c.quantization_training.train == "all" for c in candidates):
        found["train-quantized"] = student
    if speed := recipe.validation.speed:
        served = [served_mib(model_mib, c, e) for c, e in subjects(recipe)]
        found["measure-speed"] = _timed_mib(served, model_mib, speed.max_memory_mib)
        for engines in temporary_mib(recipe, model_mib):
            timed = _timed_mib(engines, model_mib, speed.max_memory_mib)
            found["measure-tpot"] = max(timed, found.get("measure-tpot", 0.0))
    if load := recipe.validation.load:
        together = sum(served_mib(model_mib, c, e) + PROCESS_MIB for c, e in subjects(recipe))  # with tokenizers
        found["measure-load"] = PROCESS_MIB + min(together, load.max_memory_mib)
    return found


def peak_memory_mib(recipe: Recipe, num_parameters: int) -> float:
    """Estimated peak of the largest stage, in MiB."""
    return max(memory_mib(recipe, num_parameters).values())


def _timed_mib(engines: list[float], model_mib: float, max_memory_mib: float) -> float:
    timed = [model_mib] * 2 + engines  # the original and its control
    together = sum(timed) + PROCESS_MIB / 2 * len(timed)
    return PROCESS_MIB + min(together, max_memory_mib)  # in groups, beyond it


def disk_mib(recipe: Recipe, num_parameters: int, download_bytes: int) -> float:
    """Estimated disk that the artifacts take, in MiB, the download included.

    And what one stage at a time takes besides: the engines that are built to keep a budget of time, and the quantized
    checkpoint that the last of them is compiled from.
    """
    model_mib = num_parameters * FLOAT32_BYTES / 2**20
    checkpoints, quantized = set(), set()  # candidates that begin alike share them
    for candidate in recipe.candidates.values():
        chain: tuple[str, ...] = ()
        for stage in (candidate.distillation, candidate.pruning, candidate.recovery):
            if stage:
                chain += (repr(stage),)
                checkpoints.add(chain)
        if candidate.quantization:
            chain += (repr(candidate.quantization),)
            quantized.add(chain)
            if candidate.quantization_training:
                quantized.add((*chain, repr(candidate.quantization_training)))
    bundles = sum(served_mib(model_mib, c, e) * (2 if c.tune else 1) for c, e in subjects(recipe))
    temporary = max((sum(engines) + model_mib / 4 for engines in temporary_mib(recipe, model_mib)), default=0.0)
    return download_bytes / 2**20 + model_mib * (1 + len(checkpoints) + len(quantized) / 4) + bundles + temporary


def subjects(recipe: Recipe) -> list[tuple[Candidate, Engine]]:
    """Every candidate, the unchanged model among them, in each of its engines."""
    baselines = [(Candidate(), engine) for engine in recipe.baseline_engines()]
    return baselines + [(c, engine) for c in recipe.candidates.values() for engine in recipe.engines_of(c)]


def temporary_mib(recipe: Recipe, model_mib: float) -> Iterator[list[float]]:
    """Of every candidate with a budget of time, the sizes of the engines that are timed to keep it."""
    for candidate in recipe.candidates.values():
        method = candidate.quantization
        if method is None or isinstance(method, FromSource) or not isinstance(method.weights, Mixed):
            continue
        if method.weights.tpot_ms is not None:
            tables = method.weights.embedding_choices or (method.embeddings,)
            engines = set(pairs_to_time(method.weights.choices, tables).values())
            (engine,) = recipe.engines_of(candidate)  # the recipe refuses the budget with more
            yield [served_mib(model_mib, candidate, engine)] * len(engines)


def served_mib(model_mib: float, candidate: Candidate, engine: Engine) -> float:
    """The size of a candidate's engine bundle."""
    return model_mib / 4 if candidate.quantization else model_mib
