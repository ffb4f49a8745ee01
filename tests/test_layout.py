"""The rules of the tree that no single file can keep: names, directions, the environment, pins."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("flows", "tasks", "infra") for path in (ROOT / package).rglob("*.py"))
READS_ENVIRONMENT = {"infra/settings.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", ["mlflow", "docker"])
def test_configuration_folder_does_not_shadow_the_library_of_its_name(name: str) -> None:
    library = importlib.import_module(name)
    assert library.__file__ is not None
    assert not Path(library.__file__).is_relative_to(ROOT / name)
    assert (ROOT / name).is_dir()
    assert not list((ROOT / name).rglob("*.py")), f"a .py in {name}/ makes Python import the folder"


def test_library_is_found_from_the_root_as_well() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import mlflow, docker; print(mlflow.__file__); print(docker.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert all(Path(file).name == "__init__.py" and Path(file).parents[1] != ROOT for file in found)


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_package_says_that_it_is_one() -> None:
    folders = {path.parent for path in SOURCES}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_is_named_for_nothing() -> None:
    vague = {"utils", "util", "helpers", "common", "base", "misc", "factory", "types"}
    assert [relative(path) for path in SOURCES if {path.stem, path.parent.name} & vague] == []


def test_no_flow_file_is_named_after_a_library() -> None:
    taken = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    taken -= {"flows", "tasks", "infra"}
    names = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__"}
    assert names & taken == set()


def test_file_with_a_flow_holds_no_class() -> None:
    """Prefect may load such a file twice; its classes would then differ from themselves."""
    for path in (ROOT / "flows").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        decorators = [d for n in nodes if isinstance(n, ast.FunctionDef) for d in n.decorator_list]
        names = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in decorators}
        if names & {"flow", "prefect.flow"}:
            assert not [n.name for n in nodes if isinstance(n, ast.ClassDef)], relative(path)


def reads_environment(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb", "os.getenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found = {alias.name for alias in node.names}
            if found & {"environ", "environb", "getenv"}:
                return True
    return False


def test_environment_is_read_in_one_file() -> None:
    found = {relative(path) for path in SOURCES if reads_environment(path.read_text())}
    assert found == READS_ENVIRONMENT


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['A']", "import os\nf(os.getenv('A'))", "from os import path, environ"]
)
def test_reading_the_environment_is_noticed(source: str) -> None:
    assert reads_environment(source)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = [re.match(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(matches), "constraints.txt holds pins and comments only"
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in matches if m}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra != "tensorrt":  # fetches gigabytes from elsewhere; never part of the tested set
            wanted += requirements
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", r)[0]).lower() for r in wanted}  # type: ignore[index]
    assert names - pins().keys() == set()


def test_installed_versions_are_the_pinned_ones() -> None:
    different = {}
    for name, version in pins().items():
        try:
            installed = importlib.metadata.version(name).split("+")[0]  # torch 2.13.0+cpu is 2.13.0
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this environment does not have
        if installed != version:
            different[name] = (installed, version)
    assert different == {}, "run `make install`"


@pytest.mark.parametrize("module", ["prefect.server.api.server", "mlflow.server.fastapi_app"])
def test_server_imports_with_the_pinned_fastapi(module: str) -> None:
    """Prefect's server does not import on fastapi 0.155 and later, and every flow needs it."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "mlflow").glob("*.md"),
    *(ROOT / "docker").glob("*.md"),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_of_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []
