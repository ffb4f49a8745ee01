"""Installed Python packages, their files and versions, found without importing the package."""

import importlib.util
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of the distributions that are installed, by name."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def package_file(package: str, file: str, *, install: str) -> Path:
    """The path of `file` inside the installed top-level `package`.

    Importing is avoided because a package that only carries data may import libraries that are not installed.

    Args:
        package: import name without dots.
        file: path relative to the package's folder.
        install: the command that installs the package, for the message.

    Raises:
        ValueError: when the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        raise ValueError(f"The Python package {package!r} is needed for {file}; it is not installed. Run: {install}")
    for folder in folders:
        path = (folder / file).resolve()
        if path.is_file() and path.is_relative_to(folder.resolve()):
            return path
    suffix = Path(file).suffix
    others = sorted(p.relative_to(f).as_posix() for f in folders for p in f.rglob(f"*{suffix}")) if suffix else []
    raise ValueError(
        f"The Python package {package!r} must contain {file}; it does not"
        + (f". It has: {', '.join(others[:5])}." if others else f". Name a file below {folders[0].name}/.")
    )
