"""Say what a recipe would do before anything heavy starts: stages, what is cached, what it needs, what cannot be."""

import json
import shutil
from dataclasses import dataclass, field
from typing import Any

from prefect import Task
from rich.markup import escape
from rich.table import Table

from flows.kinds import kind_obstacles
from flows.pipeline import pipeline
from flows.recipe import Recipe, has_time_budget
from flows.resources import ON_GPU, disk_mib, memory_mib, needs
from flows.sources import source_notes, source_obstacles
from infra.artifacts import exists
from infra.caching import content, earlier_result
from infra.console import console
from infra.hardware import hardware
from infra.settings import settings
from infra.signing import signing_key
from infra.slots import Needs
from infra.tracking import StageResult
from tasks.calibration.checkpoints import SourceEstimate, estimate
from tasks.engines import label
from tasks.quantization import grids_of
from tasks.validation.energy import Meter
from tasks.validation.gpu_memory import GpuMemory
from tasks.validation.latency import ENERGY, GPU_MEMORY


@dataclass(frozen=True)
class Step:
    """One stage of the plan."""

    title: str
    cached: bool
    needs: Needs
    shared_with: str | None = None  # an earlier stage that is the same: the same inputs and options


@dataclass
class Plan:
    """What running a recipe would mean on this machine."""

    steps: list[Step] = field(default_factory=list)
    estimate: SourceEstimate | None = None
    peak_memory_mib: float | None = None
    disk_mib: float | None = None
    notes: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Pending:
    """Stands for the result of a stage that has not run; whatever depends on it has not run either."""

    stage: str


def plan(recipe: Recipe) -> Plan:
    """The plan of `recipe`. Reads caches and metadata only.

    Raises:
        ValueError: the model source does not exist or cannot be reached.
    """
    found = Plan(obstacles=obstacles(recipe))
    planned: dict[str, tuple[str, Any]] = {}
    found.estimate = estimate(recipe.source)
    num_parameters = found.estimate.num_parameters
    memory = memory_mib(recipe, num_parameters) if num_parameters else {}

    def look_up(task: "Task[..., StageResult]", label: str = "", /, **arguments: Any) -> Any:
        title = f"{label} {task.name}".strip()
        asked = needs(task.name, title, arguments, memory.get(task.name, memory.get("")))
        stage = json.dumps([task.name, content(arguments)], sort_keys=True)
        if stage in planned:
            earlier, outcome = planned[stage]
            found.steps.append(Step(title, not isinstance(outcome, _Pending), asked, shared_with=earlier))
            return outcome
        values = [v for a in arguments.values() for v in (a.values() if isinstance(a, dict) else [a])]
        result = None
        if not any(isinstance(value, _Pending) for value in values):
            result = earlier_result(task, arguments)
        cached = result is not None and exists(result.artifact)
        found.steps.append(Step(title, cached, asked))
        planned[stage] = (title, result if cached else _Pending(title))
        return planned[stage][1]

    pipeline(recipe, look_up)
    found.notes += notes(recipe) + source_notes(recipe)
    if num_parameters:
        found.peak_memory_mib = max(memory.values())
        found.disk_mib = disk_mib(recipe, num_parameters, found.estimate.download_bytes or 0)
        _compare_with_machine(found)
    return found


def obstacles(recipe: Recipe) -> list[str]:
    """Why this machine cannot run the recipe at all; empty when it can."""
    engines = {label(engine): engine for c in recipe.candidates.values() for engine in recipe.engines_of(c)}
    missing = [reason for engine in engines.values() if (reason := engine.missing())]
    missing += [f"validation.tasks.{name}: {why}" for name, why in _missing_benchmarks(recipe).items()]
    return (
        missing
        + _unmeasurable_budgets(recipe)
        + unmeasurable_limits(recipe)
        + source_obstacles(recipe)
        + kind_obstacles(recipe)
        + _signing_obstacles(recipe)
    )


def _signing_obstacles(recipe: Recipe) -> list[str]:
    """Why what the recipe registers could not be signed at the end."""
    if recipe.register_as and settings().signing_key:
        try:
            signing_key()
        except ValueError as error:
            return [str(error)]
    return []


def _missing_benchmarks(recipe: Recipe) -> dict[str, str]:
    """Why this machine cannot measure some of the tasks, by name."""
    found = {name: benchmark.missing() for name, benchmark in recipe.validation.tasks.items()}
    return {name: why for name, why in found.items() if why}


def _unmeasurable_budgets(recipe: Recipe) -> list[str]:
    """Budgets of time on engines that can be built here and not run."""
    return [
        f"{name}: `tpot_ms` is measured on {label(engine)}. {engine.cannot_run()} Set another budget."
        for name, candidate in recipe.candidates.items()
        if has_time_budget(candidate.quantization)
        for engine in recipe.engines_of(candidate)
        if not engine.missing() and not engine.executable
    ]


def unmeasurable_limits(recipe: Recipe) -> list[str]:
    """Limits on what this machine, or an engine of the recipe, does not tell; empty where all can be judged."""
    found = []
    limited = recipe.validation.limits.by_metric()
    if ENERGY in limited and not (meter := Meter()).measures:
        found.append(f"limits.{ENERGY}: energy is {meter.says}. Let it be read, or drop the limit.")
    if GPU_MEMORY in limited:
        engines = {engine.engine for candidate in recipe.candidates.values() for engine in recipe.engines_of(candidate)}
        if not engines & {*ON_GPU}:
            found.append(
                f"limits.{GPU_MEMORY} is of engines on a GPU ({', '.join(ON_GPU)}); this recipe's are "
                f"{', '.join(sorted(engines))}. Drop the limit, or bound peak_memory_mib."
            )
        elif not (memory := GpuMemory()).measures:
            found.append(f"limits.{GPU_MEMORY}: memory of GPUs is {memory.says}. Drop the limit.")
    return found


def notes(recipe: Recipe) -> list[str]:
    """What will be done only in part here, or is seldom what is wanted, and why."""
    engines = {label(engine): engine for c in recipe.candidates.values() for engine in recipe.engines_of(c)}
    found = [
        f"{name}: built, but not run here. {engine.cannot_run()}"
        for name, engine in engines.items()
        if not engine.missing() and not engine.executable
    ]
    rounds = recipe.validation.if_inconclusive.max_rounds
    if rounds and recipe.validation.limits.metrics():
        found.append(
            f"what the first measurement leaves undecided is measured again, up to {rounds} time{'s' * (rounds > 1)}; "
            "these stages are not listed here."
        )
    for name, candidate in recipe.candidates.items():
        trained = candidate.distillation or candidate.recovery
        if trained and any(grid.zero_point == "real" for grid in grids_of(candidate.quantization)):
            found.append(
                f"{name}: `zero_point: real` rounds weights back to the grid that a quantized source came from, and "
                "takes away what training had changed (docs/quantization.md). Prefer `method: gptq` with integer zero "
                "points."
            )
    return found


def _compare_with_machine(found: Plan) -> None:
    memory_mib = hardware()["memory_mib"]
    if found.peak_memory_mib and found.peak_memory_mib > memory_mib:
        found.obstacles.append(
            f"the largest stage needs about {found.peak_memory_mib:,.0f} MiB of memory and this machine has "
            f"{memory_mib:,} MiB. Use a smaller model, or fewer candidates with speed measured at once."
        )
    home = settings().home
    existing = next(p for p in (home, *home.parents) if p.exists())
    free_mib = shutil.disk_usage(existing).free / 2**20
    if found.disk_mib and found.disk_mib > free_mib:
        found.obstacles.append(
            f"the artifacts need about {found.disk_mib:,.0f} MiB and {existing} has {free_mib:,.0f} MiB free. "
            f"Free some, or set SLIMLINE_HOME to a larger disk."
        )


def show(found: Plan) -> None:
    """Print the plan."""
    table = Table("stage", "needs", "", box=None, pad_edge=False)
    for step in found.steps:
        state = f"same as {step.shared_with}" if step.shared_with else "to run"
        table.add_row(step.title, _words(step.needs), "[green]cached[/]" if step.cached else state)
    console.print(table)
    stages = [step for step in found.steps if not step.shared_with]
    console.print(f"\n{len(stages)} stages, {sum(not step.cached for step in stages)} to run.")
    if found.estimate and found.estimate.download_bytes is not None:
        console.print(f"Download: {found.estimate.download_bytes / 2**20:,.0f} MiB.")
    if found.peak_memory_mib and found.disk_mib:
        console.print(
            f"About {found.peak_memory_mib:,.0f} MiB of memory at the peak, and {found.disk_mib:,.0f} MiB of disk."
        )
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    for obstacle in found.obstacles:
        console.print(f"[red]cannot run here[/] {escape(obstacle)}", soft_wrap=True)


def _words(needs: Needs) -> str:
    memory = f"{needs.memory_mib:,.0f} MiB" if needs.memory_mib else ""
    cores = f"{needs.cores} core{'s' * (needs.cores > 1)}"
    return ", ".join(filter(None, [cores, memory, "GPU" * needs.gpu, "the machine alone" * needs.alone]))
