"""What the runner makes of how a stage ends; stages are stand-ins here."""

from types import SimpleNamespace

import pytest
import requests
from prefect.cache_policies import NO_CACHE

from flows.running import Runner
from infra.failures import InfrastructureError
from infra.isolation import StageFailed


class Ending:
    """A task that ends with an error."""

    name = "compile"
    cache_policy = NO_CACHE
    refresh_cache = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(name="Failed", result=self.fail)

    def with_options(self, **_: object) -> "Ending":
        return self

    def fail(self) -> None:
        raise self.error


def test_a_stage_that_fails_is_said_and_is_the_candidate_s_own(capsys):
    with pytest.raises(StageFailed, match="4 bits of what"):
        Runner(None)(Ending(StageFailed("4 bits of what?")), "int8/onnxruntime")
    assert "failed int8/onnxruntime compile: 4 bits of what?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "The disk is full"),
        (requests.exceptions.ConnectionError("http://mlflow:5000/api refused"), "http://mlflow:5000 does not answer"),
        (InfrastructureError("The disk is full."), "The disk is full."),
    ],
)
def test_what_the_surroundings_did_ends_the_flow_and_names_the_stage(error, said):
    with pytest.raises(InfrastructureError, match=r"int8/onnxruntime compile could not be finished\. ") as found:
        Runner(None)(Ending(error), "int8/onnxruntime")
    assert said in str(found.value)


def test_a_mistake_of_ours_stays_what_it_is():
    with pytest.raises(KeyError, match="oops"):
        Runner(None)(Ending(KeyError("oops")))
