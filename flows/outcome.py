"""What a flow run came to, and how a terminal and the Prefect page show it."""

import sys
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from rich.console import Console

from infra.registry import Submission, Version
from infra.settings import settings
from infra.tracking import tracking_uri
from tasks.validation.report import ReportData, answer, lines, task_columns, terminal_table, time_columns
from tasks.validation.statistics import Estimate
from tasks.validation.verdicts import Verdict

TABLE_WIDTH = 128
"""Columns that the table needs; a narrower terminal wraps its lines, which still reads better than folded names."""


class Outcome(BaseModel, frozen=True):
    """Everything that a flow run found, and where it is kept."""

    data: ReportData
    version: Version | None
    report: Path
    parent_run_id: str

    @property
    def accepted(self) -> bool:
        """Whether at least one candidate kept every limit."""
        return self.data.winner is not None

    def metrics(self) -> dict[str, float]:
        """Figures of the whole run, for comparing runs with each other."""
        verdicts = [row.judgement.verdict for row in self.data.rows if row.judgement]
        found = {f"num_{name.lower()}": float(verdicts.count(name)) for name in get_args(Verdict)}
        found |= {f"winner.{name}": value for name, value in figures_of_winner(self.data).items()}
        return found

    def markdown(self) -> str:
        """The verdicts as a table for the Prefect page, and below it what they rest on, with the reasons."""
        of_tasks, times = task_columns(self.data), time_columns(self.data)
        answers = ["perplexity"] if self.data.reference else [metric.name for metric in of_tasks]
        columns = ["candidate", "size MiB", *answers, *(f"{title} ms" for title in times.values()), "verdict"]
        rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for line in lines(self.data):
            verdict = line.row.judgement.verdict if line.row.judgement else line.row.status
            size_mib = f"{line.row.size_bytes / 2**20:.1f}" if line.row.size_bytes else ""
            told = [line.perplexity] if self.data.reference else [answer(self.data, line, each) for each in of_tasks]
            told += [its.p50 if (its := line.time(name)) else None for name in times]
            rows.append(f"| {' | '.join([line.row.name, size_mib, *map(_cell, told), verdict])} |")
        for row in self.data.rows:
            if row.judgement:
                rows += ["", f"**{row.name}: {row.judgement.verdict}** {row.judgement.sentence}"]
            if row.diagnosis:
                rows += [f"* {finding.sentence}" for finding in row.diagnosis.findings]
        return "\n".join(rows)


def figures_of_winner(data: ReportData) -> dict[str, float]:
    """Size, answers and times of the candidate that won, by their names; empty where none did."""
    found: dict[str, float] = {}
    for line in lines(data):
        if line.row.name != data.winner:
            continue
        if line.row.size_bytes:
            found["size_bytes"] = float(line.row.size_bytes)
        if line.perplexity:
            found["perplexity"] = line.perplexity.value
        for name in time_columns(data):
            if times := line.time(name):
                found[name] = times.p50.value
        for metric in task_columns(data):
            if figure := answer(data, line, metric):
                found[metric.name] = figure.value
    return found


def submitted(submission: Submission) -> str:
    """Why an accepted bundle is no version yet, and who makes it one."""
    return (
        f"MLflow lets others register {submission.model}: the signed bundle waits as model {submission.model_id} for a "
        "releaser, or the deployment reconcile, to admit it (slimline admit)."
    )


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.4g}"


def show_comparison(data: ReportData, page: Path) -> None:
    """Print the table of several runs, why they may not be compared, and where the page is."""
    out = _console()
    out.print(terminal_table(data))
    for problem in data.incomparable:
        out.print(f"not comparable  {problem}", soft_wrap=True, markup=False)
    _show_files(out, page)


def show(outcome: Outcome) -> None:
    """Print the table, and where to find the rest."""
    out = _console()
    out.print(terminal_table(outcome.data))
    _show_files(out, outcome.report)
    if outcome.version:
        version = outcome.version
        out.print(f"registered  {version.model} version {version.version}: {version.uri}", soft_wrap=True)
        serve = f"mlflow models serve -m {version.uri} --env-manager local"
        path = f"PATH={Path(sys.executable).parent}:$PATH"  # MLflow looks for uvicorn there
        where = f"MLFLOW_TRACKING_URI={tracking_uri()} SLIMLINE_HOME={settings().home}"  # there: whose signatures count
        out.print(f"serve it    {path} {where} {serve}", soft_wrap=True, markup=False)
    else:
        out.print(f"registered  nothing. {outcome.data.register_note}", soft_wrap=True, markup=False)
    out.print("pages       make up   (Prefect and MLflow in a browser)")


def _console() -> Console:
    return Console(highlight=False, width=max(Console().width, TABLE_WIDTH))


def _show_files(out: Console, page: Path) -> None:
    out.print(f"report      {page}", soft_wrap=True)
    out.print(f"figures     {page.with_suffix('.json')}", soft_wrap=True)
