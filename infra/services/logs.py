"""What the services of a home said: a file each, begun anew at every start."""

from pathlib import Path

SAYS = "supervisor: "
"""Stands before what the supervisor says itself."""


def log_file(home: Path, name: str) -> Path:
    """Where the program of this name writes; its folder exists."""
    path = home / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def telling_line(log: Path) -> str:
    """The last line that tells of an error, else the last of all."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing."])[-1][:300]
