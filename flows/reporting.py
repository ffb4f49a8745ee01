"""Tell what a flow run did: the facts for the report page and the description of a registered version."""

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.judging import (
    best,
    failures,
    figures_of,
    kind_of_original,
    load_of,
    original_size_bytes,
    quality_of_all,
    speed_of,
    speed_of_all,
)
from flows.outcome import Outcome
from flows.pipeline import Products
from flows.recipe import Candidate, Recipe
from flows.running import StageRecord
from infra.artifacts import fetch
from infra.hardware import hardware, versions
from infra.registry import Version
from infra.settings import settings
from infra.tracking import RECORDED, Parent, StageResult, flow_links, git_commit, link_report, run_url
from tasks.calibration.corpora import ROLES
from tasks.calibration.corpora import describe as describe_corpus
from tasks.calibration.tokens import load_record
from tasks.engines import Engine
from tasks.engines import describe as describe_engine
from tasks.engines import label as label_of
from tasks.engines import title as title_of
from tasks.engines.tuning import Tuned
from tasks.pruning import Width
from tasks.quantization import FromSource, Gptq, Grid, QuantizationMethod, RoundToNearest
from tasks.quantization.mixed import Mixed
from tasks.quantization.summary import Choice, QuantizationSummary, QuantizedLayer
from tasks.validation.card import body, model_card
from tasks.validation.charts import QUANTILES
from tasks.validation.diagnosis import Diagnosis
from tasks.validation.latency import read_timings
from tasks.validation.pictures import draw
from tasks.validation.quality import ReferenceSummary
from tasks.validation.report import (
    Curve,
    DataSet,
    Distribution,
    LayerFigures,
    Parity,
    Quantized,
    ReportData,
    Row,
    Stage,
    render,
)
from tasks.validation.verdicts import Judgement

CURVES = {"loss": "loss", "perplexity": "perplexity on held-out text"}


def report_data(
    recipe: Recipe,
    products: Products,
    judgements: dict[str, Judgement],
    diagnoses: dict[str, Diagnosis],
    records: list[StageRecord],
    parent: Parent,
) -> ReportData:
    """All that the report tells of a flow run, but for what comes of it: the registered version, the whole time."""
    winner = best(products, judgements)
    return ReportData(
        title=recipe.name,
        source=recipe.source,
        finished_at=datetime.now(UTC),
        elapsed_s=0.0,
        original_size_bytes=original_size_bytes(products),
        reference=ReferenceSummary.model_validate(products.reference.metrics) if products.reference else None,
        kind=kind_of_original(products),
        rows=tuple(_rows(recipe, products, judgements, diagnoses, parent)),
        speed=speed_of_all(recipe, products),
        load=load_of(products),
        metrics=recipe.validation.metrics(),
        winner=winner,
        register_note=_why_not_registered(recipe, winner),
        stages=tuple(_stage(record, parent) for record in records),
        curves=tuple(_curves(records)),
        distributions=tuple(_distributions(products)),
        quantized=tuple(_quantized(records)),
        data_sets=tuple(_data_sets(recipe, products.data)),
        links=flow_links(parent),
        command=f"slimline run {recipe.name}",
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        git_commit=git_commit(),
        hardware=hardware(),
        versions=versions(*RECORDED),
        notes=tuple(_notes(records)),
    )


def publish_report(data: ReportData, version: Version | None, parent: Parent, *, elapsed_s: float) -> Outcome:
    """Write the page and its figures under the home, keep them with the MLflow run, and conclude."""
    registered = f"{version.model} version {version.version}, alias {version.alias}" if version else None
    data = data.model_copy(update={"registered": registered, "elapsed_s": elapsed_s})
    page = write_page(data, f"{data.title}-{parent.run_id[:8]}")
    with TemporaryDirectory() as folder:
        plots, cards = Path(folder) / "plots", Path(folder) / "model-cards"
        plots.mkdir()
        cards.mkdir()
        draw(data, plots)
        for row in data.rows:
            if row.judgement:
                (cards / f"{row.name.replace('/', '-')}.md").write_text(model_card(data, row), encoding="utf-8")
        folders = {each.name: each for each in (plots, cards) if any(each.iterdir())}
        link_report(parent, page, page.with_suffix(".json"), folders=folders)
    return Outcome(data=data, version=version, report=page, parent_run_id=parent.run_id)


def write_page(data: ReportData, name: str) -> Path:
    """The page, written under the home; its figures lie beside it as JSON."""
    directory = settings().home / "reports"
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".") as folder:  # both appear when they are whole
        page = render(data, Path(folder) / f"{name}.html")
        page.with_suffix(".json").write_text(data.model_dump_json(indent=1))
        for file in (page.with_suffix(".json"), page):
            file.replace(directory / file.name)
    return directory / page.name


def publish_artifacts(outcome: Outcome, parent: Parent) -> None:
    """Show the flow run's result on its Prefect page."""
    create_link_artifact(key="mlflow-run", link=run_url(parent.run_id, parent.experiment), description="MLflow run")
    create_link_artifact(
        key="report", link=outcome.report.as_uri(), link_text=outcome.report.name, description="The whole report"
    )
    create_markdown_artifact(key="verdicts", markdown=outcome.markdown(), description="Verdict per candidate")


def description(data: ReportData) -> str:
    """What a release team reads on the registered version's page, in Markdown."""
    return body(data, next(row for row in data.rows if row.name == data.winner))


def _rows(
    recipe: Recipe,
    products: Products,
    judgements: dict[str, Judgement],
    diagnoses: dict[str, Diagnosis],
    parent: Parent,
) -> list[Row]:
    quality, figures, failed = quality_of_all(recipe, products), figures_of(recipe, products), failures(products)
    rows = [
        _unmade(recipe, key, judgements) for key in failed if key not in {**products.bundles, **products.built_only}
    ]
    for key, bundle in {**products.bundles, **products.built_only}.items():
        name, label = key.split("/", 1)
        candidate = recipe.candidates.get(name, Candidate())
        parity = bundle.metrics.get("parity")
        engine = _engine(recipe, candidate, label)
        rows.append(
            Row(
                name=key,
                candidate=name,
                engine=title_of(engine),
                engine_options=describe_engine(engine) + _tuned_words(bundle),
                steps=_steps(candidate, products, name),
                status="failed" if key in failed else str(bundle.metrics["status"]),
                size_bytes=bundle.artifact.size_bytes,
                quality=quality.get(key),
                parity=Parity.model_validate({f: parity[f] for f in Parity.model_fields if f in parity})
                if isinstance(parity, dict)
                else None,
                figures=figures.get(key, {}),
                judgement=judgements.get(key),
                diagnosis=diagnoses.get(key),
                url=run_url(bundle.run_id, parent.experiment),
            )
        )
    return rows


def _tuned_words(bundle: StageResult) -> str:
    """The settings that were found fastest, and measured."""
    found = bundle.metrics.get("tuned")
    return f"; tuned: {Tuned.model_validate(found).words}" if found else ""


def _unmade(recipe: Recipe, key: str, judgements: dict[str, Judgement]) -> Row:
    """The row of an engine bundle that does not exist, because making it failed."""
    name, label = key.split("/", 1)
    engine = _engine(recipe, recipe.candidates.get(name, Candidate()), label)
    return Row(
        name=key,
        candidate=name,
        engine=title_of(engine),
        engine_options=describe_engine(engine),
        status="failed",
        size_bytes=None,
        judgement=judgements.get(key),
    )


def _engine(recipe: Recipe, candidate: Candidate, label: str) -> Engine:
    among = (*recipe.engines_of(candidate), *recipe.baseline_engines())
    return next(engine for engine in among if label_of(engine) == label)


def _steps(candidate: Candidate, products: Products, name: str) -> str:
    """What was done to the model, in a few words."""
    steps = []
    if candidate.distillation:
        steps.append(f"student of {candidate.distillation.student.layers} layers, distilled")
    if candidate.pruning:
        steps.append(_pruning_words(candidate.pruning))
    if candidate.recovery:
        steps.append("recovered")
    if candidate.quantization:
        steps.append(_quantization_words(candidate.quantization))
    if candidate.quantization_training:
        trained = "scales" if candidate.quantization_training.train == "scales" else "weights and scales"
        steps.append(f"{trained} trained after it")
    return "; ".join(steps) or "unchanged"


def _quantization_words(method: QuantizationMethod) -> str:
    if isinstance(method, FromSource):
        words = "weights as the source has them"
        return words + (f", else {_grid_words(method.otherwise)}" if method.otherwise else "")
    words, options = _grid_words(method.weights) + _method_words(method), method.activations
    if options:
        words += f", A8 static ({options.range or 'min-max'})" if options.static else ", A8 per token"
        words += f", SmoothQuant {options.smooth:g}" if options.smooth else ""
    return words + (f", KV cache {method.kv_cache}" if method.kv_cache else "")


def _grid_words(weights: Grid | Mixed) -> str:
    if isinstance(weights, Mixed):
        return f"mixed precision, {weights.budget}"
    if weights.format == "float8_e4m3":
        return "W8 FP8 per channel"
    granularity = "per tensor" if weights.per_tensor else "per channel"
    granularity = f"groups of {weights.group_size}" if weights.group_size else granularity
    kind = "symmetric" if weights.symmetric else f"asymmetric, {weights.zero_point} zero points"
    kind += " full range" if weights.full_range else ""
    return f"W{weights.bits} {granularity}, {kind}"


def _method_words(method: RoundToNearest | Gptq) -> str:
    if method.method == "rtn":
        return ""
    return ", GPTQ with AWQ scaling" if method.awq else ", GPTQ"


def _pruning_words(method: Any) -> str:
    if isinstance(method, Width):
        size = method.intermediate_size
        return f"FFN width {size}" if size else f"FFN width × {method.keep:g}"
    return f"{method.method} pruning"


def _stage(record: StageRecord, parent: Parent) -> Stage:
    return Stage(
        title=record.title,
        cached=record.cached,
        elapsed_s=record.elapsed_s,
        peak_memory_mib=record.peak_memory_mib,
        gave=_gave(record.result),
        url=run_url(record.result.run_id, parent.experiment),
    )


def _gave(result: StageResult) -> str:
    """The most telling figures of a stage, in words."""
    found: dict[str, Any] = result.metrics

    def value(name: str) -> float:
        entry = found[name]
        return float(entry["value"] if isinstance(entry, dict) else entry)

    if "perplexity_after" in found:
        return (
            f"perplexity {value('perplexity_before'):.4g} to {value('perplexity_after'):.4g} on held-out text, "
            f"{value('num_tokens'):,.0f} tokens at {value('tokens_per_s'):.0f}/s in {found['precision']}"
        )
    if "num_nonzero" in found:
        before, after = value("num_parameters_before"), value("num_parameters")
        return f"{before / 1e6:.1f} M to {after / 1e6:.1f} M parameters, {value('num_nonzero') / 1e6:.1f} M not zero"
    if "bits_per_weight" in found:
        return f"{value('bits_per_weight'):.2f} bits per weight, relative error {value('relative_error'):.3%}"
    if "perplexity_increase_percent" in found:
        return f"perplexity {value('perplexity'):.4g}, {value('perplexity_increase_percent'):+.2f} %"
    if "perplexity" in found:
        return f"perplexity {value('perplexity'):.4g}"
    if "num_training_tokens" in found:
        windows = value("num_evaluation_windows")
        return f"{value('num_training_tokens'):,.0f} tokens to train on, {windows:.0f} windows to judge by"
    if "most_sensitive" in found:
        return (
            f"{value('num_parts'):.0f} parts; {found['most_sensitive']} minds most, KL {value('most_sensitive_kl'):.2g}"
        )
    if "tables" in found:
        times = [choice["tpot_ms"] for choice in (*found["blocks"], *found["tables"])]
        return f"{min(times):.3g} to {max(times):.3g} ms per token on {found['engine']}"
    if "num_blocks" in found:
        return f"{len(found['subjects'])} subjects in {value('num_blocks'):.0f} interleaved blocks"
    if "subjects" in found:
        levels = sum(len(subject["levels"]) for subject in found["subjects"].values())
        return f"{len(found['subjects'])} subjects under {levels} levels of load"
    words = f"{result.artifact.size_bytes / 2**20:,.1f} MiB"
    parity = found.get("parity") or {}
    if "top1_agreement" in parity:
        words += f", top-1 agreement with PyTorch {parity['top1_agreement']:.2%}"
    elif "min_cosine" in parity:
        words += f", least cosine with PyTorch {parity['min_cosine']:.4f}"
    return words


def _curves(records: list[StageRecord]) -> list[Curve]:
    curves = []
    seen = set()
    for record in records:
        points: Any = record.result.metrics.get("curve")
        if not points or record.result.run_id in seen:
            continue
        seen.add(record.result.run_id)
        for metric, title in CURVES.items():
            known = [point for point in points if point.get(metric) is not None]
            if len(known) > 1:
                steps, values = (tuple(point[name] for point in known) for name in ("num_tokens", metric))
                curves.append(Curve(title=record.title, metric=title, steps=steps, values=values))
    return curves


def _distributions(products: Products) -> list[Distribution]:
    """Of every timed request at batch size 1, from what the first measurement wrote."""
    import numpy as np

    stage, speed = products.speed, speed_of(products)
    if stage is None or speed is None:
        return []
    found = []
    for subject, timings in sorted(read_timings(fetch(stage.artifact), speed).items()):
        if speed.new_tokens:
            times = {
                "ttft_ms": timings.ttft_ms(),
                "tpot_ms": timings.tpot_ms(),
                "inter_token_ms": timings.inter_token_ms(),
            }
        else:
            times = {"latency_ms": timings.latency_ms()}
        for metric, values in times.items():
            spread = np.quantile(values, QUANTILES)
            found.append(Distribution(subject=subject, metric=metric, num=values.size, values=tuple(spread)))
    return found


def _data_sets(recipe: Recipe, data: StageResult) -> list[DataSet]:
    found = load_record(fetch(data.artifact))["roles"]
    return [
        DataSet(
            role=role,
            description=describe_corpus(recipe.data.corpus(role)),
            num_sequences=found[role]["num_sequences"],
            sequence_length=found[role]["sequence_length"],
            sha256=found[role]["sha256"],
        )
        for role in ROLES
    ]


def _quantized(records: list[StageRecord]) -> list[Quantized]:
    """Every quantization once, though candidates share it."""
    found: dict[str, Quantized] = {}
    for record in records:
        if "left_float" not in record.result.metrics:
            continue
        summary = QuantizationSummary.model_validate(record.result.metrics)
        found.setdefault(
            record.result.run_id,
            Quantized(
                title=record.title,
                bits_per_weight=summary.bits_per_weight,
                choice=_choice_words(summary.mixed) if summary.mixed else "",
                layers=tuple(_layer(layer) for layer in summary.layers),
                left_float=summary.left_float,
            ),
        )
    return list(found.values())


def _choice_words(choice: Choice) -> str:
    predicted = choice.predicted_tpot_ms
    return choice.layers + (f", {predicted:.3g} ms per token predicted" if predicted is not None else "")


def _layer(layer: QuantizedLayer) -> LayerFigures:
    granularity = f"groups of {layer.group_size}" if layer.group_size else "per channel"
    return LayerFigures(
        name=layer.name,
        method=layer.method,
        grid=f"{layer.bits} bits, {granularity}, {'symmetric' if layer.symmetric else 'asymmetric'}",
        relative_error=layer.relative_error,
        output_error=layer.output_error,
        sqnr_db=layer.sqnr_db,
        worst_channels=layer.worst_channels,
        inputs=layer.inputs,
    )


def _notes(records: list[StageRecord]) -> list[str]:
    notes = []
    for record in records:
        notes += [
            f"{record.title}: attempt {number} failed and was made again: {said}"
            for number, said in enumerate(record.failures, start=1)
        ]
        found = record.result.metrics.get("notes")
        notes += [f"{record.title}: {note}" for note in found] if isinstance(found, list) else []
    return list(dict.fromkeys(notes))


def _why_not_registered(recipe: Recipe, winner: str | None) -> str:
    if not recipe.register_as:
        return "The recipe names no registered model (register_as)."
    return "" if winner else "No candidate was accepted, and nothing else is ever registered."
