"""Measure and judge one engine bundle against another, or against a model, without making anything."""

import hashlib
import json
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from prefect import flow

from flows.bundles import find_bundle
from flows.check import unmeasurable_limits
from flows.diagnosing import diagnose_candidates
from flows.judging import judge_candidates
from flows.kinds import kind_obstacles
from flows.outcome import Outcome
from flows.pipeline import ORIGINAL, Products, Run, begin, measure_answers, measure_together, surviving
from flows.recipe import Recipe, RecipeError, parse
from flows.reporting import publish_artifacts, publish_report, report_data
from flows.running import Runner
from infra.artifacts import fetch
from infra.console import console
from infra.releases import Known
from infra.services import start_inner_server
from infra.tracking import StageResult, end_flow, flow_run
from tasks.bundle import import_bundle
from tasks.calibration.checkpoints import model_type
from tasks.calibration.exported_families import kind_of
from tasks.checkpoint import fingerprint, import_checkpoint
from tasks.engines import label, title
from tasks.engines.compiling import MANIFEST, read_manifest, settings_here


def plan_validation(bundle: str, against: str, *, recipe: Recipe | None, options: Sequence[str]) -> tuple[Recipe, Path]:
    """What to measure, as a recipe with one candidate, and the bundle's directory.

    Args:
        bundle: a directory or models:/NAME@ALIAS.
        against: the same, or a source as recipes name it.
        recipe: whose data and validation to take; None: the defaults.
        options: "path=value" texts that change them, as "validation.limits.perplexity.max_degradation_percent=1".

    Raises:
        ValueError: the bundle is none, or an option is not one of a recipe.
    """
    directory = find_bundle(bundle)
    engine = read_manifest(directory).engine
    name = re.sub(r"[^a-z0-9._-]+", "-", bundle.removeprefix("models:/").rstrip("/").rpartition("/")[2].lower())
    name = name.lstrip("._-")[:64] or "bundle"
    content: dict[str, Any] = {}
    if recipe:
        kept = recipe.model_dump(mode="json", exclude_unset=True, include={"data", "validation", "seed"})
        content |= kept
    for option in options:
        path, equals, value = option.partition("=")
        if not equals or not path:
            raise ValueError(f"An option is given as --set path=value; got {option!r}.")
        if path.startswith("validation.if_inconclusive"):
            raise ValueError(f"`slimline validate` measures once; got {option!r}. Drop it, or measure more windows.")
        _put(content, path.split("."), yaml.safe_load(value))
    _fit(content, directory)
    content |= {
        "name": f"validate-{name}"[:64],
        "source": against,
        "candidates": {f"candidate-{name}"[:64] if name in (ORIGINAL, "pytorch") else name: {}},
        "engines": [engine.model_dump(mode="json")],
    }
    _put(content, ["validation", "if_inconclusive"], {"max_rounds": 0})  # it measures once, so no look is shared
    planned = parse(content, where="validation")
    if "unquantized" in planned.validation.limits.never_slower_than:
        raise RecipeError(
            "validation.limits.never_slower_than: a bundle is validated against one other thing; write "
            "`original`, which is what --against names."
        )
    if reasons := unmeasurable_limits(planned):
        raise RecipeError("This machine cannot judge the limits: " + " ".join(reasons))
    if reasons := kind_obstacles(planned):
        raise RecipeError("The bundle cannot be validated so: " + " ".join(reasons))
    return planned, directory


def _fit(content: dict[str, Any], bundle: Path) -> None:
    """Sets what a bundle of an encoder or encoder-decoder leaves no choice of, unless it was said; in place."""
    family = model_type(str(bundle))
    kind = kind_of(family) if family else "decoder"
    validation = content.setdefault("validation", {})
    if kind != "decoder":
        validation.setdefault("quality", None)
    if kind == "encoder" and validation.get("speed", {}) is not None:
        _put(content, ["validation", "speed", "new_tokens"], validation.get("speed", {}).get("new_tokens", 0))


def _put(content: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = content[name] = {}
        content = inner
    content[path[-1]] = value


def command_line(bundle: str, against: str, recipe: str | None, options: Sequence[str]) -> str:
    """The command line that measures and judges the same again; the arguments are those of `plan_validation`."""
    words = ["slimline", "validate", bundle, "--against", against, *(["--recipe", recipe] if recipe else [])]
    return shlex.join([*words, *(word for option in options for word in ("--set", option))])


def verdict_here(version: Known) -> tuple[str, str]:
    """Verdict and its reason for a registered version, measured on this machine by the recipe of its run.

    Raises:
        ValueError: its run is gone, or this machine cannot measure what the recipe limits.
    """
    name = f"models:/{version.model}/{version.version}"
    if version.run is None:
        raise ValueError(
            f"{name} is judged by the recipe of its run; MLflow has no such run any more. Register it anew."
        )
    recipe = parse(json.loads(version.run.recipe), where=f"the recipe of {name}")
    planned, directory = plan_validation(name, recipe.source, recipe=recipe, options=[])
    start_inner_server()
    outcome = validate(planned, name, str(directory), command_line(name, recipe.source, recipe.name, []))
    (judgement,) = (row.judgement for row in outcome.data.rows if row.judgement)
    return judgement.verdict, judgement.sentence


@flow(name="validate", flow_run_name="{recipe.name}", persist_result=False)
def validate(recipe: Recipe, bundle: str, directory: str, command: str) -> Outcome:
    """Quality, speed, limits and the report of one bundle.

    Args:
        recipe: From `plan_validation`: its source is what the bundle is compared with.
        bundle: As the user named it.
        directory: Where it lies.
        command: That makes the report again.
    """
    started_at = time.monotonic()
    with flow_run(
        f"validate {bundle}", recipe_json=recipe.model_dump_json(indent=1), tags={"bundle": bundle}
    ) as parent:
        console.print(f"[bold]{bundle}[/] against {recipe.source}")
        run = Runner.of(recipe, parent)
        products = _measure(recipe, Path(directory), run)
        judgements = judge_candidates(recipe, products)
        diagnoses = diagnose_candidates(recipe, products, judgements, run)
        found = report_data(recipe, products, judgements, diagnoses, run.records, parent)
        rows = tuple(row.model_copy(update={"steps": bundle}) for row in found.rows)
        told: dict[str, Any] = {"rows": rows, "command": command, "register_note": "Validating registers nothing."}
        if products.original.kind == "engine":
            path = fetch(products.original.artifact)
            told["original_engine"] = title(settings_here(path, read_manifest(path))[0])
        found = found.model_copy(update=told)
        outcome = publish_report(found, None, parent, elapsed_s=time.monotonic() - started_at)
    end_flow(parent, "FINISHED", outcome.metrics())
    publish_artifacts(outcome, parent)
    return outcome


def _measure(recipe: Recipe, directory: Path, run: Run) -> Products:
    """The same stages as a flow's, on a bundle that is there already."""
    (name,) = recipe.candidates
    key = f"{name}/{label(recipe.engines[0])}"
    original = _original(recipe.source, run)
    candidate = _import(directory, key, run)
    products = begin(recipe, original, run)
    products.bundles[key] = candidate
    with surviving(products, [], key):
        measure_answers(key, candidate, recipe, products, run)
    measure_together(recipe, products, run)
    return products


def _original(against: str, run: Run) -> StageResult:
    """Another bundle, if it is one, else a model to import."""
    if against.startswith("models:/"):
        from infra.registry import holds_bundle

        if holds_bundle(against):
            return _import(find_bundle(against), ORIGINAL, run)
    elif (Path(against) / MANIFEST).exists():
        return _import(Path(against), ORIGINAL, run)
    return run(import_checkpoint, ORIGINAL, source=against, source_fingerprint=fingerprint(against))


def _import(directory: Path, name: str, run: Run) -> StageResult:
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST}; an engine bundle is a directory that compiling wrote.")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return run(import_bundle, name, bundle=str(directory.resolve()), manifest_sha256=digest)
