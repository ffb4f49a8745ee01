"""The model card of a judged bundle: what it was made of and how, what was measured, and the verdict.

It stands beside the bundle, in MLflow, because the bundle's own files are hashed and never changed.
"""

from tasks.calibration.exported_families import Kind
from tasks.validation.measured import metric_of
from tasks.validation.report import TASKS, ReportData, Row, interval, number

TASK_TYPES: dict[Kind, str] = {
    "decoder": "text-generation",
    "encoder": "feature-extraction",
    "encoder-decoder": "text2text-generation",
}
"""As the hub names what models do."""


def model_card(data: ReportData, row: Row) -> str:
    """Markdown with YAML front matter as the Hugging Face hub reads it, evaluation results included.

    Args:
        data: of the flow run.
        row: of the bundle; judged.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task_type = TASK_TYPES[data.kind]
    results = [
        EvalResult(
            task_type=task_type,
            dataset_type="text",
            dataset_name=_data_set(data, metric_of(figure, data.metrics)),
            metric_type=figure,
            metric_name=figure,
            metric_value=float(f"{measured.value.value:.6g}"),
        )
        for figure, measured in row.figures.items()
        if data.metrics[metric_of(figure, data.metrics)].aspect == "quality"
    ]
    about = ModelCardData(
        base_model=data.source if _is_hub_id(data.source) else None,
        library_name="slimline",
        pipeline_tag=task_type,
        tags=["slimline", row.engine.split()[0].lower()],
        model_name=row.name,
        eval_results=results or None,
    )
    return f"---\n{about.to_yaml()}\n---\n\n{body(data, row)}"


def body(data: ReportData, row: Row) -> str:
    """The card without its front matter: what a registered version says of itself."""
    verdict = row.judgement.verdict if row.judgement else "not judged"
    lines = [f"# {row.name}", "", f"**{verdict}** {row.judgement.sentence if row.judgement else ''}".rstrip(), ""]
    lines += [f"* {check.sentence}" for check in (row.judgement.checks if row.judgement else ())]
    lines += ["", f"* original: {data.source}, in {data.original_engine}", f"* made by: {row.steps or 'unchanged'}"]
    lines += [f"* engine: {row.engine_options or row.engine}"]
    if row.size_bytes:
        size_mib, before_mib = row.size_bytes / 2**20, data.original_size_bytes / 2**20
        lines.append(f"* size: {number(size_mib)} MiB; the original has {number(before_mib)} MiB")
    if row.parity:
        lines.append(f"* against PyTorch on the same weights: {row.parity.words}")
    lines += _table(data, row)
    if row.diagnosis:
        lines += ["", f"Why it is {row.diagnosis.of}:", ""]
        lines += [f"* {finding.sentence}" for finding in row.diagnosis.findings]
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    cpu = f"{data.hardware.get('cpu')}, {data.hardware.get('cores')} cores"
    lines += ["", f"Measured {data.finished_at:%Y-%m-%d} on {cpu}; {versions}. `{data.command}` measures it again.", ""]
    return "\n".join(lines)


def _table(data: ReportData, row: Row) -> list[str]:
    if not row.figures:
        return []
    lines = ["", "| measured | value | 95 % interval | original |", "|---|---|---|---|"]
    for figure, measured in row.figures.items():
        metric = data.metrics[metric_of(figure, data.metrics)]
        unit = f" {metric.unit}" if metric.unit else ""
        original = "" if measured.original is None else f"{number(measured.original)}{unit}"
        value = number(measured.value.value)
        lines.append(f"| {figure} | {value}{unit} | {interval(measured.value)} | {original} |")
    return lines


def _data_set(data: ReportData, metric: str) -> str:
    """What a metric of quality was measured on."""
    option = data.metrics[metric].option
    if option.startswith(TASKS):
        return f"the items of the recipe's {option}"
    evaluation = next((each.description for each in data.data_sets if each.role == "evaluation"), "evaluation text")
    assert data.reference is not None  # else there is no such metric
    return f"{evaluation}, {data.reference.num_windows} windows of {data.reference.window} tokens"


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/")) and ":" not in source
