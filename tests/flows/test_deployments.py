import json
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from typer.testing import CliRunner

from flows.benchmark import benchmark
from flows.cli import app
from flows.deployments import prefect_file, read
from infra.automations import DEAD_AFTER, dead_runs
from infra.services.programs import HEARTBEAT_S, POOL, RELEASE_POOL
from infra.settings import settings
from tests.flows.recipes import assert_flat

FORMS = Path(__file__).parent / "forms.json"
CONTENT = yaml.safe_load(prefect_file().read_text())


def flow_of(deployment: dict) -> Flow:
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("deployment", CONTENT["deployments"], ids=lambda deployment: deployment["name"])
def test_every_deployment_names_a_flow_a_pool_and_parameters_that_the_flow_takes(deployment):
    flow = flow_of(deployment)
    assert isinstance(flow, Flow)
    assert deployment["work_pool"]["name"] in CONTENT["definitions"]["work_pools"]
    assert deployment["description"]
    given = deployment.get("parameters", {})
    assert given.keys() <= flow.parameters.properties.keys()
    for schedule in deployment.get("schedules", []):
        assert schedule["active"] is False  # whoever wants one switches it on


def test_the_local_pool_has_all_that_runs_without_a_gpu():
    plan = read(prefect_file(), [POOL])
    assert list(plan.work_pools) == [POOL]
    assert plan.deployments == {POOL: ("start", "optimize", "benchmark", "nightly")}
    assert plan.concurrency_limits == {}
    of_release = ("promote", "rollback", "retention", "examine", "reconcile")
    assert read(prefect_file(), [RELEASE_POOL]).deployments == {RELEASE_POOL: of_release}


def test_the_limits_that_pools_name_are_created():
    plan = read(prefect_file(), [])
    named = {
        deployment["work_pool"].get("job_variables", {}).get("env", {}).get("SLIMLINE_GPU_LIMIT")
        for deployment in CONTENT["deployments"]
    }
    assert named - {None} == set(plan.concurrency_limits)


def test_a_pool_that_is_not_defined_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"one of definitions.work_pools \(cpu, .*\); got gpu-sm42\. Define it there"):
        read(prefect_file(), ["gpu-sm42"])
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        read(tmp_path / "nowhere.yaml", [])


def test_deploying_without_a_server_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    settings.cache_clear()
    try:
        result = CliRunner().invoke(app, ["deploy"])
    finally:
        settings.cache_clear()
    assert result.exit_code == 2
    assert "slimline up" in result.stderr


def test_a_run_is_dead_after_three_heartbeats():
    assert DEAD_AFTER.total_seconds() == 3 * HEARTBEAT_S
    assert dead_runs().trigger.within == DEAD_AFTER


def test_what_people_fill_in_is_as_it_was_looked_at():
    """Screenshots in docs/ show these forms. When one changes, look at it in the page, then write forms.json anew."""
    forms = {
        deployment["name"]: parameter_schema(flow_of(deployment)).model_dump(mode="json")
        for deployment in CONTENT["deployments"]
        if deployment["name"] in ("start", "benchmark", "promote", "rollback")
    }
    assert forms == json.loads(FORMS.read_text()), json.dumps(forms, indent=1)


def test_the_form_of_benchmark_is_flat_and_every_field_has_its_default():
    assert_flat(benchmark.parameters.model_dump())


def test_benchmarking_against_nothing_says_what_to_name():
    with pytest.raises(ValueError, match="against: a bundle is judged against something"):
        benchmark.fn(bundle="somewhere", against="", recipe="defaults", limits=[])
