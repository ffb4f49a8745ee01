from pathlib import Path

import pytest

from infra import caching
from infra.artifacts import Artifact
from infra.caching import source_digest, sources, stage_key


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "tasks/__init__.py": "",
        "tasks/quantization/__init__.py": "from tasks.quantization.rtn import Rtn",
        "tasks/quantization/rtn.py": "import torch\nfrom tasks.quantization import grid\nclass Rtn: ...",
        "tasks/quantization/grid.py": "BITS = 8",
        "tasks/quantization/apply.py": "def f():\n    from tasks.quantization.rtn import Rtn",
        "tasks/pruning/__init__.py": "",
        "tasks/pruning/wanda.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(caching, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for cached in (caching._imports, caching.sources, caching.source_digest):
        cached.cache_clear()


def test_sources_follow_imports_also_inside_functions(tree):
    names = {p.relative_to(tree).as_posix() for p in sources("tasks.quantization.apply")}
    assert names == {
        "tasks/__init__.py",
        "tasks/quantization/__init__.py",
        "tasks/quantization/apply.py",
        "tasks/quantization/grid.py",
        "tasks/quantization/rtn.py",
    }


def test_a_changed_algorithm_changes_what_depends_on_it_and_nothing_else(tree):
    quantization, pruning = source_digest("tasks.quantization.apply"), source_digest("tasks.pruning.wanda")
    (tree / "tasks/quantization/grid.py").write_text("BITS = 4")
    forget()
    assert source_digest("tasks.quantization.apply") != quantization
    assert source_digest("tasks.pruning.wanda") == pruning


def test_a_module_that_does_not_exist_is_refused(tree):
    with pytest.raises(ValueError, match=r"tasks\.nope"):
        source_digest("tasks.nope")


def key(**parameters):
    return stage_key("quantize", parameters, "tasks.quantization.apply", (), None)


def test_the_key_follows_contents_not_places(tree):
    here = Artifact(uri="file:///a", sha256="11", size_bytes=1)
    there = Artifact(uri="s3://b/a", sha256="11", size_bytes=1)
    other = Artifact(uri="file:///a", sha256="22", size_bytes=1)
    assert key(checkpoint=here) == key(checkpoint=there) != key(checkpoint=other)
    assert key(checkpoints={"a": here}) == key(checkpoints={"a": there}) != key(checkpoints={"a": other})


def test_the_key_ignores_where_the_result_is_recorded_and_for_whom(tree):
    assert key(bits=8, parent="run-1", label="int8") == key(bits=8, parent="run-2", label="again")
    assert key(bits=8) != key(bits=4)


def test_the_key_ignores_when_to_give_up(tree):
    assert key(bits=8, timeout_s=60.0) == key(bits=8, timeout_s=600.0)
