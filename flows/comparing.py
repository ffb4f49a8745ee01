"""Earlier runs side by side on one page, from what MLflow keeps of them; nothing is measured anew."""

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from flows.reporting import write_page
from infra.tracking import FlowRun, find_flow_run, report_figures, run_url
from tasks.validation.latency import ORIGINAL, SpeedSummary, SubjectSpeed
from tasks.validation.load import LoadSummary
from tasks.validation.report import Curve, Distribution, Quantized, ReportData, Row, Stage

Titled = TypeVar("Titled", Stage, Curve, Quantized)


def compare(runs: Sequence[str]) -> tuple[ReportData, Path]:
    """The page of several runs, and where it lies.

    Args:
        runs: MLflow run ids, Prefect flow run ids or the names of flow runs, at least two different ones.

    Raises:
        ValueError: there is no such run, or it kept no figures that this version can read.
    """
    found = [find_flow_run(run) for run in runs]
    if len({run.run_id for run in found}) < len(found) or len(found) < 2:
        raise ValueError("Comparing needs at least two different runs; name each once.")
    data = join([(_name(run, found), _read(run)) for run in found])
    links = {f"MLflow: {_name(run, found)}": run_url(run.run_id, run.experiment) for run in found}
    data = data.model_copy(update={"links": links, "command": shlex.join(["slimline", "compare", *runs])})
    return data, write_page(data, f"compare-{'-'.join(run.run_id[:6] for run in found)}")


def _name(run: FlowRun, among: Sequence[FlowRun]) -> str:
    same = sum(other.name == run.name for other in among)
    return run.name if same == 1 else f"{run.name} {run.run_id[:6]}"


def _read(run: FlowRun) -> ReportData:
    text = report_figures(run)
    try:
        return ReportData.model_validate(json.loads(text))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ValueError(
            f"The figures of run {run.run_id} ({run.name}) were written by another version of Slimline: {where} is not "
            "as this version has it. Run it again."
        ) from None


def join(runs: Sequence[tuple[str, ReportData]]) -> ReportData:
    """One page's data from those of several runs, by name; bundles go by "run: candidate/engine".

    The first run gives what a page has once: the original, its text. Originals of others are rows of their own.
    """
    first = runs[0][1]
    rows: list[Row] = []
    subjects: dict[str, SubjectSpeed] = {}
    distributions: list[Distribution] = []
    for index, (run, data) in enumerate(runs):
        prefix = f"{run}: "
        if index:
            rows.append(
                Row(
                    name=prefix + ORIGINAL,
                    candidate=prefix + ORIGINAL,
                    engine=data.original_engine,
                    steps=data.source,
                    size_bytes=data.original_size_bytes,
                    perplexity=data.reference.perplexity if data.reference else None,
                )
            )
        rows += [
            row.model_copy(update={"name": prefix + row.name, "candidate": prefix + row.candidate}) for row in data.rows
        ]
        for name, subject in (data.speed.subjects if data.speed else {}).items():
            subjects[name if name == ORIGINAL and index == 0 else prefix + name] = subject
        distributions += [
            each.model_copy(
                update={"subject": each.subject if each.subject == ORIGINAL and index == 0 else prefix + each.subject}
            )
            for each in data.distributions
        ]
    problems = incomparable(runs)
    return first.model_copy(
        update={
            "title": " against ".join(run for run, _ in runs),
            "finished_at": datetime.now(UTC),
            "elapsed_s": 0.0,
            "rows": tuple(rows),
            "speed": _speeds(runs, subjects),
            "load": _loads(runs),
            "distributions": tuple(distributions),
            "metrics": {name: metric for _, data in runs for name, metric in data.metrics.items()},
            "winner": None,
            "registered": None,
            "register_note": "",
            "compared": tuple(run for run, _ in runs),
            "incomparable": tuple(problems),
            "stages": tuple(_titled(run, each) for run, data in runs for each in data.stages),
            "curves": tuple(_titled(run, each) for run, data in runs for each in data.curves),
            "quantized": tuple(_titled(run, each) for run, data in runs for each in data.quantized),
            "notes": tuple(f"{run}: {note}" for run, data in runs for note in data.notes),
            "recipe_yaml": "\n".join(f"# {run}\n{data.recipe_yaml}" for run, data in runs),
        }
    )


def _titled(run: str, each: Titled) -> Titled:
    return each.model_copy(update={"title": f"{run}: {each.title}"})


def _speeds(runs: Sequence[tuple[str, ReportData]], subjects: dict[str, SubjectSpeed]) -> SpeedSummary | None:
    """The first summary with all subjects in it; noisy if one was."""
    measured = [(run, data.speed) for run, data in runs if data.speed]
    if not measured:
        return None
    noise = " ".join(f"{run}: {speed.noise}" for run, speed in measured)
    noisy = any(speed.noisy for _, speed in measured)
    return measured[0][1].model_copy(update={"subjects": subjects, "noisy": noisy, "noise": noise})


def _loads(runs: Sequence[tuple[str, ReportData]]) -> LoadSummary | None:
    """The first summary with all subjects in it."""
    measured = [(run, data.load) for run, data in runs if data.load]
    if not measured:
        return None
    subjects = {f"{run}: {name}": subject for run, load in measured for name, subject in load.subjects.items()}
    return measured[0][1].model_copy(update={"subjects": subjects})


def incomparable(runs: Sequence[tuple[str, ReportData]]) -> list[str]:
    """Why figures of these runs must not be held against each other, a sentence each; empty if they may."""
    problems = []
    for what, consequence, values in (
        ("processors", "times and memory say nothing about each other", [_machine(data) for _, data in runs]),
        ("engines' versions", "speed may differ for that alone", [_versions(data) for _, data in runs]),
        ("evaluation windows", "perplexities are of other texts", [_evaluation(data) for _, data in runs]),
        ("lengths or threads", "times are of other work", [_lengths(data) for _, data in runs]),
        ("originals", "ratios and agreement are to other models", [data.source for _, data in runs]),
    ):
        if len(set(values)) > 1:
            told = "; ".join(f"{run}: {value or 'not measured'}" for (run, _), value in zip(runs, values, strict=True))
            problems.append(f"Other {what}, so that {consequence} ({told}).")
    return problems


def _machine(data: ReportData) -> str:
    return f"{data.hardware.get('cpu')}, {data.hardware.get('cores')} cores"


def _versions(data: ReportData) -> str:
    named = ("onnxruntime", "openvino", "tensorrt", "torch")
    return ", ".join(f"{name} {data.versions[name]}" for name in named if name in data.versions)


def _evaluation(data: ReportData) -> str:
    if data.reference is None:
        return ""
    digest = next((each.sha256 for each in data.data_sets if each.role == "evaluation"), "")
    return f"{data.reference.num_windows} windows of {data.reference.window} tokens, sha256 {digest[:12]}"


def _lengths(data: ReportData) -> str:
    speed = data.speed
    return f"{speed.prompt_tokens}+{speed.new_tokens} tokens, {speed.threads} threads" if speed else ""
