"""What tests of the command line share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def slimline(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user does, in a process of its own, which takes nothing over from what ran in this one."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT,
        env={**ours, "SLIMLINE_HOME": str(home), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
