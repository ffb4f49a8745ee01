"""All checks, each in a process of its own that is ended when it takes too long: nothing hangs, no crash spreads."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

from infra.console import console
from infra.doctor import machine, servers, stores
from infra.doctor.finding import Finding, problem, skipped
from infra.settings import environment, settings

CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": machine.python,
    "libraries": machine.libraries,
    **{module: partial(machine.engine, module) for module in machine.ENGINES},
    "home": machine.home,
    "disk": machine.disk,
    "memory": machine.memory,
    "gpu": machine.gpu,
    "processes": machine.processes,
    "limits": machine.limits,
    "databases": stores.databases,
    "network": servers.network,
    "mlflow": servers.mlflow,
    "prefect": servers.prefect,
    "store": stores.store,
    "redis": stores.redis,
}
"""What is looked at, in the order it is told."""

TIMEOUT_S = 60.0
AT_ONCE = {"PREFECT_CLIENT_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "SLIMLINE_S3_RETRY_S": "0"}
"""A run waits until a server is back; here the first answer is what is asked for."""
FINDINGS = TypeAdapter(list[Finding])
ROOT = Path(__file__).parents[2]


def examine(only: Sequence[str] = (), timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """What every check found, or those named in `only`, in the order of CHECKS.

    Raises:
        ValueError: there is no check of such a name.
    """
    if unknown := set(only) - CHECKS.keys():
        raise ValueError(f"Checks are {', '.join(CHECKS)}; got {', '.join(sorted(unknown))}. Name one of them.")
    chosen = [name for name in CHECKS if not only or name in only]
    try:
        home = settings().home
    except ValueError as error:
        broken = problem("settings", str(error), "Correct the variable, or unset it")
        return [broken, *(skipped(name, "the settings have to be right first") for name in chosen)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return [each for found in pool.map(lambda name: _run(name, home, timeout_s), chosen) for each in found]


def _run(name: str, home: Path, timeout_s: float) -> list[Finding]:
    """What the check found, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.doctor", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        cwd=ROOT,
        env=environment(**AT_ONCE, SLIMLINE_HOME=str(home)),
    )
    try:
        said, complaint = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return [
            problem(
                name,
                f"not done after {timeout_s:.0f} s",
                "Whom it asks takes calls and does not answer, or this machine is loaded: --timeout gives it longer",
            )
        ]
    finally:
        _end_group(process)
    try:
        return FINDINGS.validate_json(said)
    except ValidationError:
        lines = complaint.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit code {process.returncode}"
        return [
            problem(
                name,
                f"the check itself ended with {how}: {lines[-1][:300]}",
                f"Run it alone, it says more: {sys.executable} -m infra.doctor {name}",
            )
        ]


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list."""
    return json.dumps([finding.model_dump() for finding in findings], indent=1)


STYLES = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}


def show(findings: Sequence[Finding]) -> None:
    """Print the findings as a table, and then what to do."""
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    for finding in findings:
        style = STYLES[finding.state]
        says = Text(finding.says, style="dim" if finding.state == "skipped" else "")
        table.add_row(Text(finding.state, style=style), Text(finding.name), says)
    console.print(table)
    to_do = [finding for finding in findings if finding.remedy]
    if to_do:
        console.print("\nWhat to do", style="bold")
    for finding in to_do:
        console.print(Text.assemble((f"{finding.name}: ", STYLES[finding.state]), finding.remedy, "."), soft_wrap=True)
    num_problems = sum(finding.state == "problem" for finding in findings)
    num_warnings = sum(finding.state == "warning" for finding in findings)
    console.print(f"\n{_counted(num_problems, 'problem')}, {_counted(num_warnings, 'warning')}.")


def _counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"
