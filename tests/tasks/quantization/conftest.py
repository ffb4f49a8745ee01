"""Fixtures for stages that are killed and go on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra.isolation import StageCrashed, run_isolated


class Killing:
    """Runs a stage in a process of its own, whole, killed or again, each into `folder`/`name`."""

    def __init__(self, folder: Path, stage: str, result: type, arguments: dict[str, Any]) -> None:
        self._folder, self._stage, self._result, self._arguments = folder, stage, result, arguments
        self._run = partial(run_isolated, log_path=folder / "log")

    def run(self, name: str, work: str, on_progress: Callable[..., None] | None = None) -> Any:
        """What the stage returns."""
        done, _ = self._run(self._stage, self._given(name, work), result=self._result, on_progress=on_progress)
        return done

    def killed(self, work: str, moment: str) -> None:
        """It dies by SIGKILL at the moment of the test's `dying`."""
        given = {**self._given("lost", work), "moment": moment}
        with pytest.raises(StageCrashed, match="SIGKILL"):
            self._run("dying_stage:dying", given, result=type(None))

    def _given(self, name: str, work: str) -> dict[str, Any]:
        (self._folder / name).mkdir()
        return {**self._arguments, "out": self._folder / name, "work_dir": self._folder / work}


@pytest.fixture
def killing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Killing]:
    """Makes a `Killing` of a stage from the source of a module whose `dying` is the stage with a death in it."""

    def make(source: str, stage: str, result: type, arguments: dict[str, Any]) -> Killing:
        (tmp_path / "dying_stage.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return Killing(tmp_path, stage, result, arguments)

    return make
