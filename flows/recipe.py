"""Recipe: what to make of which model, as one strict pydantic model; the schema of recipes/*.yaml.

A recipe names a source model, data, and candidates. Each candidate is a chain of optional stages in the order the
subject dictates (distillation, pruning, recovery, quantization, training of what that gave), compiled for each engine
and judged against limits. Candidates that begin alike share those stages: a stage with the same inputs and options runs
once.
"""

import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator

from flows.explain import explain
from flows.retrying import Execution
from tasks.calibration.corpora import Data
from tasks.distillation import Distillation, Recovery
from tasks.engines import Engine, label
from tasks.engines.tuning import SETTINGS, Tuning
from tasks.pruning import PruningMethod
from tasks.quantization import FromSource, QuantizationMethod, grids_of
from tasks.quantization.mixed import Mixed
from tasks.quantization.training import QuantizationTraining
from tasks.validation import Limits, Load, Price, Quality, Speed, unmeasurable
from tasks.validation.benchmarks import AnyBenchmark
from tasks.validation.benchmarks.measuring import metrics_of
from tasks.validation.measured import Metric
from tasks.validation.metrics import SIZE_METRICS, by_name
from tasks.validation.statistics import confidence_of_look

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
RESERVED_NAMES = ("original", "pytorch")


class Candidate(BaseModel, frozen=True, extra="forbid"):
    """One way to make the model cheaper."""

    distillation: Distillation | None = Field(None, description="Make a smaller student and train it on the model.")
    pruning: PruningMethod | None = Field(None, description="Remove weights or structures.")
    recovery: Recovery | None = Field(None, description="Train the pruned model to recover; needs `pruning`.")
    quantization: QuantizationMethod | None = Field(None, description="Store weights in fewer bits.")
    quantization_training: QuantizationTraining | None = Field(
        None, description="Train the quantized model to recover; needs `quantization`."
    )
    engines: tuple[Engine, ...] | None = Field(None, min_length=1, description="Instead of the recipe's engines.")
    tune: Tuning | None = Field(
        None, description="Search the settings with which its engines are fastest here; {}: as usual."
    )

    @model_validator(mode="after")
    def _training_follows_what_it_repairs(self) -> "Candidate":
        if self.recovery and not self.pruning:
            raise ValueError("`recovery` trains a pruned model; add `pruning`, or use `distillation` instead.")
        if self.quantization_training and not self.quantization:
            raise ValueError("`quantization_training` trains a quantized model; add `quantization`.")
        method = self.quantization
        if not self.quantization_training or method is None or isinstance(method, FromSource):
            return self
        if method.activations or method.kv_cache:
            raise ValueError("`quantization_training` is of weights alone; drop it, or `activations` and `kv_cache`.")
        if any(grid.format == "float8_e4m3" for grid in grids_of(method)):
            raise ValueError("`quantization_training` is of integers; drop it, or `format: float8_e4m3`.")
        return self

    @model_validator(mode="after")
    def _nothing_changes_what_the_source_has(self) -> "Candidate":
        stages = ("distillation", "pruning", "quantization_training")
        changed_by = next((stage for stage in stages if getattr(self, stage)), None)
        if isinstance(self.quantization, FromSource) and changed_by:
            raise ValueError(
                f"`method: source` keeps weights as they were imported, and `{changed_by}` changes them; "
                "use `method: gptq` or `rtn` with it."
            )
        return self


class IfInconclusive(BaseModel, frozen=True, extra="forbid"):
    """How much more is measured of candidates that the first measurement does not decide."""

    max_rounds: int = Field(
        1,
        ge=0,
        le=10,
        description="Each measures as many windows and blocks again. Every look at the data may err, so intervals are "
        "wider with more of them: the 5 % of error are shared (Bonferroni).",
    )
    max_minutes: float = Field(20.0, gt=0, description="No new round starts after this much measuring.")

    @property
    def confidence(self) -> float:
        """Of the intervals of every look."""
        return confidence_of_look(1 + self.max_rounds)


class Validation(BaseModel, frozen=True, extra="forbid"):
    """What is measured of every candidate, and the limits it has to keep."""

    quality: Quality | None = Field(
        Quality(),
        description="Perplexity and agreement with the original, of decoders; null: they are not measured, and `tasks` "
        "say how good answers are, as of encoders and encoder-decoders.",
    )
    speed: Speed | None = Field(Speed(), description="null: speed and memory are not measured.")
    load: Load | None = Field(None, description="null: no engine is put under load.")
    price_per_hour: Price | None = Field(None, description="Of the machine; null: no cost per token.")
    tasks: dict[Name, AnyBenchmark] = Field(
        {},
        description="Benchmarks of answers, by name: translation, summarization, questions, classification, code, "
        "embeddings. "
        "Their metrics are called NAME.METRIC: limits may bound `wmt.chrf`.",
    )
    limits: Limits = Limits()
    if_inconclusive: IfInconclusive = IfInconclusive()
    max_minutes_per_candidate: float = Field(
        120.0, gt=0, description="A candidate whose answers take longer to measure counts as hung, and is rejected."
    )

    def metrics(self) -> dict[str, Metric]:
        """What is measured of every candidate, by name: what `limits` may limit."""
        options = [self.quality, self.speed, self.load]
        measured = [metric for each in options if each for metric in each.metrics()]
        measured += [metric for name, benchmark in self.tasks.items() for metric in metrics_of(name, benchmark)]
        found = by_name([*SIZE_METRICS, *measured])
        costs = self.price_per_hour.metrics(found) if self.price_per_hour else ()
        return by_name([*found.values(), *costs])

    @model_validator(mode="after")
    def _price_is_used(self) -> "Validation":
        if self.price_per_hour and not self.speed and not self.load:
            raise ValueError("`price_per_hour` needs a measured throughput; give `speed` or `load`, or drop the price.")
        return self

    @model_validator(mode="after")
    def _answers_are_measured(self) -> "Validation":
        if self.quality is None and not self.tasks and self.limits.metrics():
            raise ValueError(
                "`quality: null` leaves `tasks` to say how good answers are, and it is empty: a candidate would be "
                "accepted whatever it answers. Give a benchmark in `tasks`, such as embeddings, or drop the limits."
            )
        return self

    @model_validator(mode="after")
    def _metrics_differ(self) -> "Validation":
        self.metrics()
        return self


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """What to make of which model."""

    name: Name = Field(description="Names the MLflow experiment; by convention <model>_<target>.")
    source: str = Field(
        min_length=1,
        description="Hub id, checkpoint directory, .gguf file, package:NAME/FILE, models:/NAME@ALIAS, or s3://BUCKET/PREFIX.",
    )
    data: Data = Field(Data(), description="Text for training, calibration and evaluation.")
    seed: int = Field(0, ge=0, lt=2**31)
    candidates: dict[Name, Candidate] = Field(min_length=1)
    engines: tuple[Engine, ...] = Field(min_length=1, description="Engines of every candidate that names none.")
    validation: Validation = Validation()
    execution: Execution = Field(Execution(), description="Retries and time limits; changes nothing about results.")
    register_as: Name | None = Field(None, description="Registered model that the best accepted candidate joins.")

    @field_validator("candidates")
    @classmethod
    def _names_are_free(cls, candidates: dict[str, Candidate]) -> dict[str, Candidate]:
        for name in candidates:
            if name in RESERVED_NAMES:
                raise ValueError(f"{name!r} names the unchanged model, which is always measured; choose another name.")
        return candidates

    @field_validator("source")
    @classmethod
    def _no_stray_space(cls, source: str) -> str:
        if re.search(r"^\s|\s$", source):
            raise ValueError(f"the source begins or ends with a space: {source!r}")
        return source

    @model_validator(mode="after")
    def _limits_can_be_judged(self) -> "Recipe":
        problems = unmeasurable(self.validation.limits, self.validation.metrics())
        if problems:
            raise ValueError(" ".join(problems))
        if self.register_as and not self.validation.limits.metrics():
            raise ValueError("`register_as` needs a limit in validation.limits: nothing is accepted unjudged.")
        for name, candidate in self.candidates.items():
            engines = candidate.engines or self.engines
            kinds = [label(engine) for engine in engines]
            if len(set(kinds)) < len(kinds):
                raise ValueError(f"candidate {name!r} lists the same engine twice: {', '.join(kinds)}.")
        return self

    @model_validator(mode="after")
    def _processes_share_evenly(self) -> "Recipe":
        for candidate in self.candidates.values():
            for stage in (candidate.distillation, candidate.recovery, candidate.quantization_training):
                if stage:
                    stage.shared_by(self.execution.training.processes)
        return self

    @model_validator(mode="after")
    def _engines_hold_the_grids(self) -> "Recipe":
        for name, candidate in self.candidates.items():
            for engine in self.engines_of(candidate):
                if problem := misfit(candidate.quantization, engine):
                    raise ValueError(f"candidate {name!r}: {problem}")
        return self

    @model_validator(mode="after")
    def _tuned_engines_have_settings(self) -> "Recipe":
        for name, candidate in self.candidates.items():
            without = [label(engine) for engine in self.engines_of(candidate) if engine.engine not in SETTINGS]
            if candidate.tune and without:
                raise ValueError(
                    f"candidate {name!r}: `tune` searches settings of {', '.join(SETTINGS)}; {', '.join(without)} has "
                    "none. Name others in the candidate's `engines`, or leave `tune` out."
                )
        return self

    @model_validator(mode="after")
    def _time_budgets_can_be_measured(self) -> "Recipe":
        for name, candidate in self.candidates.items():
            if not has_time_budget(candidate.quantization):
                continue
            engines = [label(engine) for engine in self.engines_of(candidate)]
            if len(engines) > 1:
                raise ValueError(
                    f"candidate {name!r}: `tpot_ms` is a budget on one engine; got {len(engines)}: "
                    f"{', '.join(engines)}. Name one in the candidate's `engines`, and write a candidate per engine."
                )
            if not self.validation.speed:
                raise ValueError(
                    f"candidate {name!r}: `tpot_ms` is measured as validation.speed says, and that is null. "
                    "Give it, or set another budget."
                )
        return self

    def engines_of(self, candidate: Candidate) -> tuple[Engine, ...]:
        """The engines that `candidate` is compiled for."""
        return candidate.engines or self.engines

    def baseline_engines(self) -> tuple[Engine, ...]:
        """Engines in which the unchanged model is measured too: every one that a candidate runs in here."""
        used = [engine for candidate in self.candidates.values() for engine in self.engines_of(candidate)]
        return tuple({label(engine): engine for engine in used if engine.executable}.values())


def misfit(method: QuantizationMethod | None, engine: Engine) -> str | None:
    """Why `engine` cannot compute with what `method` makes; None if it can."""
    held = next((problem for grid in grids_of(method) if (problem := engine.cannot_hold(grid))), None)
    if held or method is None or isinstance(method, FromSource):
        return held
    return engine.cannot_round(method.activations, method.kv_cache)


def has_time_budget(method: QuantizationMethod | None) -> bool:
    """Whether `method` chooses grids by the time they take on an engine."""
    if method is None or isinstance(method, FromSource):
        return False
    return isinstance(method.weights, Mixed) and method.weights.tpot_ms is not None


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where and what is allowed."""


def load(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        RecipeError: the file is missing, is no YAML, or breaks the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = ", ".join(names()) or "none"
        raise RecipeError(f"There is no recipe {path}. Shipped recipes: {shipped}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"The recipe {path} must be a mapping of options; got {type(content).__name__}.")
    return parse(content, where=str(path))


def parse(content: dict[str, object], where: str = "recipe") -> Recipe:
    """The recipe in a mapping; keys that begin with "x-" hold shared pieces for YAML anchors and are dropped."""
    options = {k: v for k, v in content.items() if not k.startswith("x-")}
    try:
        return Recipe.model_validate(options)
    except ValidationError as error:
        raise RecipeError(f"{where} cannot be used:\n{explain(error, Recipe)}") from None


def directory() -> Path:
    """Where the shipped recipes lie: recipes/ of a checkout, or the copy inside the installed package."""
    root = Path(__file__).parents[1] / "recipes"
    return root if root.is_dir() else Path(__file__).parent / "_recipes"


def names() -> list[str]:
    """Names of the shipped recipes, without .yaml."""
    return sorted(path.stem for path in directory().glob("*.yaml"))


def find(name_or_path: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(name_or_path)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    return directory() / f"{name_or_path}.yaml"
