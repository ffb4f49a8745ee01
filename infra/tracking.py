"""What ran, on what, and what came of it: MLflow runs, metrics, data sets and the lineage of models.

MLflow is imported when first used (it takes seconds) and only through clients with explicit run ids: its active run
belongs to a thread, Prefect's tasks run in many.
"""

import contextlib
import hashlib
import json
import logging
import math
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from pydantic import BaseModel, JsonValue
from pydantic_core import to_jsonable_python

from infra import services
from infra.artifacts import Artifact, remove_abandoned
from infra.failures import silent_server
from infra.hardware import hardware, versions
from infra.locks import held
from infra.settings import prepare_environment, settings
from infra.torchrun import Torchrun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

logger = logging.getLogger(__name__)

EXPERIMENT = "slimline"
"""One experiment for all recipes, so that MLflow can compare them."""
EXPERIMENT_OF_UP = "slimline-up"
"""That of runs through the servers of `slimline up`. An experiment fixes at its creation where the files of its runs
lie: of these in the S3 of those servers, of runs without servers below the home. Searches look into both."""

# fmt: off
RECORDED = (
    "slimline", "torch", "transformers", "compressed-tensors", "accelerate", "datasets", "numpy", "onnx",
    "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx-cu13", "prefect", "mlflow",
)
# fmt: on
"""Distributions whose versions are stored with every flow run."""

WRITE_INTERVAL_S = 1.0
POINTS_PER_WRITE = 10
ROOT = Path(__file__).parents[1]

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Parent(BaseModel, frozen=True):
    """The MLflow run of a flow run. Tasks get it to record under; it is never part of a cache key.

    `experiment` is the experiment's id; `stage_timeout_s` is the limit of stages that have none of their own;
    `training` says how many processes train together.
    """

    run_id: str
    experiment: str
    stage_timeout_s: float | None = None
    training: Torchrun = Torchrun()


class StageResult(BaseModel, frozen=True, extra="forbid"):
    """What a stage made and where it is recorded; this is what tasks return and Prefect keeps.

    `model_id` is set when the artifact is a node of the lineage; `run_id` is the run that made it, which may belong
    to an earlier flow run when the result comes from the cache.
    """

    artifact: Artifact
    kind: str
    metrics: dict[str, JsonValue]
    elapsed_s: float
    peak_memory_mib: float | None
    run_id: str
    model_id: str | None


class Ancestor(BaseModel, frozen=True):
    """A model in a lineage: what it is, the run that made it, and the models that run started from."""

    model_id: str
    name: str
    kind: str
    sha256: str | None
    uri: str | None
    run_id: str | None
    parents: tuple[str, ...]


def tracking_uri() -> str:
    """Where runs are recorded: the server of SLIMLINE_TRACKING_URI, that of `slimline up`, or <home>/mlflow.db."""
    if uri := settings().tracking_uri:
        return uri
    if found := services.running(settings().home):
        return found.mlflow_url
    return _database_uri(settings().home)


def _database_uri(home: Path) -> str:
    return f"sqlite:///{home.resolve() / 'mlflow.db'}"


def client() -> "MlflowClient":
    """A client of `tracking_uri()`, which also becomes the one of MLflow's functions that take no client."""
    prepare_environment()
    import mlflow

    uri = tracking_uri()
    found = _connect(uri)
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    if mlflow.get_registry_uri() != uri:
        mlflow.set_registry_uri(uri)
    return found


class Answer(NamedTuple):
    """What a server said to a request of ours."""

    status: int
    headers: Mapping[str, str]
    body: str


def ask(uri: str, path: str, body: dict[str, JsonValue] | None = None, *, timeout_s: float) -> Answer:
    """What the MLflow server at `uri` answers, called as MLflow's client calls it, whatever the status is.

    The client's credentials and certificates are those of MLflow's environment variables.

    Raises:
        OSError: it cannot be reached, or not in time.
    """
    prepare_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(  # type: ignore[no-untyped-call]
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            path,
            "GET" if body is None else "POST",
            timeout=timeout_s,
            max_retries=0,
            raise_on_status=False,
            **({} if body is None else {"json": body}),
        )
    except MlflowException as error:
        if isinstance(error.__context__, OSError):  # requests' own, which says more
            raise error.__context__ from None
        raise
    return Answer(answer.status_code, answer.headers, answer.text)


def server_version(uri: str, *, timeout_s: float) -> str:
    """MLflow's version at the server."""
    return ask(uri, "/version", timeout_s=timeout_s).body.strip()


def expected_schema() -> str:
    """The revision of a tracking database that the installed MLflow works with."""
    prepare_environment()
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())  # type: ignore[no-untyped-call]


@cache
def _connect(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs, with its traceback, what it raises
    if uri == _database_uri(settings().home):
        prepare_database(settings().home)
    return cast("MlflowClient", _Undisturbed(MlflowClient(uri)))


class _Undisturbed:
    """A client whose calls run in one thread of their own, so that Ctrl-C never ends one half-way.

    Signals interrupt the main thread only. An interrupted write would keep its transaction open, and with it the
    database locked for the one that records how the run ended.
    """

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self._thread.submit(value, *args, **kwargs).result()


def prepare_database(home: Path) -> str:
    """Create <home>/mlflow.db or bring it to MLflow's present schema; its URI.

    Processes that open a new database at once would each run the migrations and all but one crash; a file lock lets
    the first do it. A new database gets its name when it is complete, so one interrupted half-way does no harm.
    """
    prepare_environment()
    import mlflow.store.db.utils as database

    logging.getLogger("alembic").setLevel(logging.WARNING)
    file = home / "mlflow.db"
    draft = file.with_suffix(".new")
    with held(home / "mlflow.lock"):
        draft.unlink(missing_ok=True)
        opened = file if file.exists() else draft
        engine = database.create_sqlalchemy_engine_with_retry(f"sqlite:///{opened}")  # type: ignore[no-untyped-call]
        try:
            if opened == draft:
                database._initialize_tables(engine)  # type: ignore[no-untyped-call]
            else:
                database._upgrade_db(engine)  # type: ignore[no-untyped-call]  # what `mlflow db upgrade` calls
        finally:
            engine.dispose()
        if opened == draft:
            draft.replace(file)
    return _database_uri(home)


def experiment_id() -> str:
    """The id of the experiment of new runs, created on first use."""
    from mlflow.exceptions import MlflowException

    of_up = not settings().tracking_uri and services.running(settings().home) is not None
    name = EXPERIMENT_OF_UP if of_up else EXPERIMENT
    found = client().get_experiment_by_name(name)
    if found is None:
        # A server knows its own artifact store.
        where = None if of_up or settings().tracking_uri else (settings().home / "mlruns" / name).as_uri()
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # else the page shows agents and traces
            return str(client().create_experiment(name, artifact_location=where, tags=kind))
        except MlflowException:  # somebody else created it a moment ago
            found = client().get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def every(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """All that a search of MLflow's client finds: it gives a page at a time, whose size differs by what is searched."""
    token: str | None = None
    while token != "":
        page = search(*arguments, **options, max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def experiment_ids() -> list[str]:
    """The ids of the experiments that hold runs, for searches."""
    found = [client().get_experiment_by_name(name) for name in (EXPERIMENT, EXPERIMENT_OF_UP)]
    return [str(experiment.experiment_id) for experiment in found if experiment]


def run_url(run_id: str, experiment: str) -> str:
    """The run's page; for runs without a server, the page that `slimline up` will show."""
    server = settings().tracking_uri or services.addresses(settings().home).mlflow_url
    return f"{server}/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


# Flow runs


def start_flow(name: str, *, recipe_json: str, tags: Mapping[str, str]) -> Parent:
    """The run of this flow run: found by its tag prefect.flow_run_id when it is retried or resumed, else created.

    Records the recipe, the hardware, library versions and the code's git commit. Runs whose process died without a
    word (SIGKILL, power) are marked KILLED on the way, and what they left half written is removed.
    """
    experiment = experiment_id()
    tags = {
        "mlflow.runName": name,
        "mlflow.source.name": "slimline",
        "mlflow.source.type": "PROJECT",
        "slimline.role": "flow",
        "slimline.process": _own_process(),
        "recipe.sha256": hashlib.sha256(recipe_json.encode()).hexdigest(),
        **_git_tags(),
        **_prefect_tags(),
        **tags,
    }
    if url := tags.get("prefect.flow_run_url"):
        tags["mlflow.note.content"] = f"Prefect flow run: [{url}]({url})"
    _close_dead_flows(experiment)
    remove_abandoned()
    parent = _find_flow(experiment, tags.get("prefect.flow_run_id"))
    if parent is not None:
        kill_running_children(parent)
        client().update_run(parent.run_id, status="RUNNING")
        _set_tags(parent.run_id, tags)
        return parent
    run = client().create_run(experiment, run_name=name, tags=tags)
    parent = Parent(run_id=run.info.run_id, experiment=experiment)
    _log_params(parent.run_id, json.loads(recipe_json))
    client().log_text(parent.run_id, recipe_json, "recipe.json")
    client().log_dict(parent.run_id, hardware(), "hardware.json")
    client().log_dict(parent.run_id, versions(*RECORDED), "versions.json")
    return parent


@contextlib.contextmanager
def flow_run(name: str, *, recipe_json: str, tags: Mapping[str, str]) -> Iterator[Parent]:
    """Within, the run of this flow run, see `start_flow`; what is raised ends it as failed, an interrupt as killed."""
    parent = start_flow(name, recipe_json=recipe_json, tags=tags)
    try:
        yield parent
    except BaseException as error:
        if not silent_server(error):  # asking again would take minutes
            try:
                end_flow(parent, "FAILED" if isinstance(error, Exception) else "KILLED")
            except Exception as failed:  # noqa: BLE001 what ended the flow is raised
                logger.warning("could not record that %s failed: %s", name, failed)
        raise


def end_flow(parent: Parent, status: Status, metrics: Mapping[str, Any] | BaseModel | None = None) -> None:
    """Close the flow's run with its figures."""
    _log_metrics(parent.run_id, flatten(metrics or {}))
    client().set_terminated(parent.run_id, status)


def link_report(
    parent: Parent, html: Path, figures: Path | None = None, *, folders: Mapping[str, Path] | None = None
) -> None:
    """Keep the report with the flow's run; MLflow shows the page among the run's artifacts.

    Args:
        figures: its JSON.
        folders: of files to keep beside it, by the name of their folder there.
    """
    for file in (html, figures):
        if file:
            client().log_artifact(parent.run_id, str(file))
    for name, folder in (folders or {}).items():
        client().log_artifacts(parent.run_id, str(folder), name)
    _set_tags(parent.run_id, {"report": html.name})


class FlowRun(BaseModel, frozen=True):
    """A recorded flow run."""

    run_id: str
    experiment: str
    name: str
    report: str | None


def find_flow_run(name: str) -> FlowRun:
    """The flow run with this MLflow run id, Prefect flow run id or name; of several of a name, the last.

    Raises:
        ValueError: there is none; the message lists the last ones.
    """
    found = _search(experiment_ids(), "tags.`slimline.role` = 'flow'")  # the last comes first
    for run in found:
        if name in (run.info.run_id, run.info.run_name, run.data.tags.get("prefect.flow_run_id")):
            return _flow_run(run)
    known = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in found[:8])
    raise ValueError(f"MLflow at {tracking_uri()} knows no flow run {name!r}. The last: {known or 'none'}.")


def _flow_run(run: "Run") -> FlowRun:
    return FlowRun(
        run_id=run.info.run_id,
        experiment=run.info.experiment_id,
        name=str(run.info.run_name),
        report=run.data.tags.get("report"),
    )


class RunFacts(BaseModel, frozen=True):
    """Figures of a flow run, the machine they were measured on, its recipe as JSON, and its page."""

    metrics: dict[str, float]
    hardware: dict[str, JsonValue]
    recipe: str
    url: str


def run_facts(run_id: str) -> RunFacts | None:
    """What was recorded of a flow run; None: MLflow does not know it (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        run = client().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    with TemporaryDirectory() as folder, stored_files(f"run {run_id}"):
        kept = {
            name: Path(client().download_artifacts(run_id, name, folder)) for name in ("hardware.json", "recipe.json")
        }
        return RunFacts(
            metrics=run.data.metrics,
            hardware=json.loads(kept["hardware.json"].read_text(encoding="utf-8")),
            recipe=kept["recipe.json"].read_text(encoding="utf-8"),
            url=run_url(run_id, run.info.experiment_id),
        )


def report_figures(run: FlowRun) -> str:
    """The JSON of a flow run's report.

    Raises:
        ValueError: the run made no report.
    """
    if run.report is None:
        raise ValueError(f"Flow run {run.run_id} ({run.name}) made no report: it failed, or still runs.")
    with TemporaryDirectory() as folder:
        name = str(Path(run.report).with_suffix(".json"))
        with stored_files(f"run {run.run_id}"):
            return Path(client().download_artifacts(run.run_id, name, folder)).read_text(encoding="utf-8")


@contextlib.contextmanager
def stored_files(of: str) -> Iterator[None]:
    """Within, reading files that MLflow keeps says when the server is missing through which they are read."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if "mlflow-artifacts" in str(error) and tracking_uri().startswith("sqlite:"):
            raise ValueError(
                f"The files of {of} lie in the S3 server of `slimline up`, which does not run. Start it: slimline up"
            ) from None
        raise


def flow_links(parent: Parent) -> dict[str, str]:
    """Pages of this flow run: its MLflow run and, inside a flow, its Prefect run."""
    links = {"MLflow run": run_url(parent.run_id, parent.experiment)}
    if url := _prefect_tags().get("prefect.flow_run_url"):
        links["Prefect flow run"] = url
    return links


def git_commit() -> str | None:
    """The commit of the running code, when it runs from a checkout."""
    return _git_tags().get("mlflow.source.git.commit")


def _find_flow(experiment: str, flow_run_id: str | None) -> Parent | None:
    if flow_run_id is None:
        return None
    found = _search([experiment], f"tags.`slimline.role` = 'flow' and tags.`prefect.flow_run_id` = '{flow_run_id}'")
    return Parent(run_id=found[0].info.run_id, experiment=experiment) if found else None


def _search(experiments: Sequence[str], query: str) -> "list[Run]":
    return list(every(client().search_runs, list(experiments), query)) if experiments else []


def _own_process() -> str:
    own = services.ProcessId.own()
    return f"{socket.gethostname()} {own.pid} {own.started_at}"


def _close_dead_flows(experiment: str) -> None:
    for run in _search([experiment], "attributes.status = 'RUNNING' and tags.`slimline.role` = 'flow'"):
        host, pid, started_at = run.data.tags.get("slimline.process", "? 0 0").split(" ")
        if host != socket.gethostname() or services.ProcessId(pid=int(pid), started_at=float(started_at)).alive():
            continue
        kill_running_children(Parent(run_id=run.info.run_id, experiment=experiment))
        _set_tags(run.info.run_id, {"error": "The process of this run died without a word."})
        client().set_terminated(run.info.run_id, "KILLED")


def kill_running_children(parent: Parent) -> None:
    """Mark the attempts that still count as running KILLED: for when nothing runs any more."""
    query = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{parent.run_id}'"
    for run in _search([parent.experiment], query):
        _set_tags(run.info.run_id, {"error": "The process of this attempt died without a word."})
        client().set_terminated(run.info.run_id, "KILLED")


def _git_tags() -> dict[str, str]:
    """The commit of the running code, when it runs from a checkout."""
    tags = {}
    questions = {"mlflow.source.git.commit": ("rev-parse", "HEAD"), "git.status": ("status", "--porcelain")}
    if not (ROOT / ".git").exists():
        return {}
    for tag, question in questions.items():
        try:
            answer = subprocess.run(
                ["git", "-C", str(ROOT), *question], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        tags[tag] = answer.stdout.strip()
    tags["git.status"] = "changed since the commit" if tags["git.status"] else "clean"
    return tags


def _prefect_tags() -> dict[str, str]:
    """Which Prefect run this is, and its page; empty outside of one."""
    from prefect.runtime import flow_run, task_run

    tags = {}
    if flow_run.id:
        tags["prefect.flow_run_id"] = str(flow_run.id)
        api = settings().prefect_api_url
        server = api.removesuffix("/api") if api else services.addresses(settings().home).prefect_url
        tags["prefect.flow_run_url"] = f"{server}/v2/runs/flow-run/{flow_run.id}"
    if task_run.id:
        tags["prefect.task_run_id"] = str(task_run.id)
        tags["prefect.run_count"] = str(task_run.run_count)
    return tags


# Stages


@contextlib.contextmanager
def stage_run(
    stage: str,
    parent: Parent,
    *,
    params: Mapping[str, Any],
    inputs: Sequence[StageResult] = (),
    tags: Mapping[str, str] | None = None,
) -> Iterator["StageRun"]:
    """One attempt at a stage: a child run of `parent`, ended FINISHED, FAILED on an error or KILLED when interrupted.

    Args:
        stage: the run's name.
        parent: the flow's run.
        params: options; models and nested mappings are flattened to dotted names.
        inputs: earlier results it starts from. Those that are models become the run's model inputs, the edges of the
            lineage; data become its data set inputs.
        tags: more of them.
    """
    found = _prefect_tags()
    attempt = found.get("prefect.run_count", "1")
    all_tags = {
        "mlflow.parentRunId": parent.run_id,
        "mlflow.source.name": "slimline",
        "slimline.role": "stage",
        "slimline.attempt": attempt,
        **found,
        **(tags or {}),
    }
    name = stage if attempt == "1" else f"{stage}, attempt {attempt}"
    run = StageRun(client().create_run(parent.experiment, run_name=name, tags=all_tags).info.run_id, stage, parent)
    try:
        _log_params(run.run_id, params)
        run.log_inputs(inputs)
        with _system_metrics(run.run_id):
            yield run
        run.flush()
    except BaseException as error:
        status: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if silent_server(error):
            raise
        try:
            run.flush()
            _set_tags(run.run_id, {"error": f"{type(error).__name__}: {error}"})
            client().set_terminated(run.run_id, status)
        except Exception:
            logger.warning("could not record that %s ended %s", stage, status, exc_info=True)
        raise
    client().set_terminated(run.run_id, "FINISHED")


@contextlib.contextmanager
def _system_metrics(run_id: str) -> Iterator[None]:
    """Within, CPU, memory, disk, network and GPUs of the machine become metrics `system/...` of the run.

    Only where MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says so, and there is a server: it writes from a thread of its own.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    uri = tracking_uri()
    wanted = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get()  # type: ignore[no-untyped-call]
    if not wanted or not uri.startswith("http"):
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)  # type: ignore[no-untyped-call]
    monitor.start()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        monitor.finish()  # type: ignore[no-untyped-call]


class StageRun:
    """The open run of one attempt at a stage. Safe to use from several threads."""

    def __init__(self, run_id: str, stage: str, parent: Parent) -> None:
        self.run_id = run_id
        self._stage = stage
        self._parent = parent
        self._started_at = time.monotonic()
        self._lock = threading.Lock()
        self._points: list[tuple[int, int, dict[str, float]]] = []
        self._written_at = -math.inf

    def progress(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Points of live curves. Cheap: at most one write a second, of ten points spread over it; the last is kept."""
        if not metrics:
            return
        with self._lock:
            self._points.append((step, time.time_ns() // 1_000_000, dict(metrics)))
            if time.monotonic() - self._written_at < WRITE_INTERVAL_S:
                return
            try:
                self._write()
            except Exception:
                logger.warning("could not record the progress of %s", self._stage, exc_info=True)
            self._written_at = time.monotonic()

    def flush(self) -> None:
        """Write the points that wait."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        from mlflow.entities import Metric

        kept = _thinned(self._points, POINTS_PER_WRITE)
        if kept:
            batch = [
                Metric(metric_name(name), float(value), timestamp, step)
                for step, timestamp, metrics in kept
                for name, value in metrics.items()
            ]
            client().log_batch(self.run_id, metrics=batch)
        self._points.clear()

    def log_inputs(self, inputs: Sequence[StageResult]) -> None:
        """Record what this run starts from; see `stage_run`."""
        from mlflow.entities import LoggedModelInput
        from mlflow.exceptions import MlflowException

        models = []
        for result in inputs:
            if result.model_id is None:
                continue
            try:
                client().get_logged_model(result.model_id)
            except MlflowException:
                logger.warning(
                    "the lineage of %s lacks model %s: MLflow does not know it", self._stage, result.model_id
                )
                continue
            models.append(LoggedModelInput(result.model_id))
        if models:
            client().log_inputs(self.run_id, models=models)
        for result in inputs:
            if result.kind == "data":
                self.log_dataset("data", result.artifact.sha256, result.artifact.uri, profile=result.metrics)
        edges = [{"kind": r.kind, "sha256": r.artifact.sha256, "run_id": r.run_id} for r in inputs]
        if edges:
            self.set_tags({"slimline.inputs": json.dumps(edges)})

    def log_dataset(
        self, name: str, digest: str, source: str, *, context: str = "input", profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record a data set this run reads.

        Args:
            name: e.g. "stdlib".
            digest: of what was used; MLflow keeps 36 characters of it, the whole stays in the source.
            source: where it comes from: a URI, a hub id, a package.
            context: what for: "training", "calibration", "evaluation".
            profile: figures that describe it.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        about = json.dumps({"uri": source, "sha256": digest})
        profile_json = json.dumps(to_jsonable_python(profile)) if profile else None
        dataset = Dataset(name, digest[:36], "local", about, profile=profile_json)
        client().log_inputs(self.run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_file(self, path: Path) -> None:
        """Keep a file with the run."""
        client().log_artifact(self.run_id, str(path))

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` with the run, as a file `name`."""
        client().log_text(self.run_id, text, name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        _set_tags(self.run_id, tags)

    def finish(
        self,
        artifact: Artifact,
        *,
        kind: str,
        metrics: Mapping[str, Any] | BaseModel,
        model: bool = False,
        about: StageResult | None = None,
        elapsed_s: float | None = None,
        peak_memory_mib: float | None = None,
        directory_to_log: Path | None = None,
    ) -> StageResult:
        """Record what the stage made.

        Args:
            artifact: what it published; its manifest is kept with the run.
            kind: "checkpoint", "data", "engine", "measurement", ...
            metrics: its figures. Numbers become metrics, nested names joined by dots; everything, lists and text
                included, is kept as metrics.json and in the returned value.
            model: the artifact is a model, a node of the lineage.
            about: the model that `metrics` were measured on, when that is not the one made here.
            elapsed_s: default: since the run was opened.
            peak_memory_mib: of the process that did the work.
            directory_to_log: small files to keep with the run besides.
        """
        elapsed_s = time.monotonic() - self._started_at if elapsed_s is None else elapsed_s
        figures = _json(to_jsonable_python(metrics))
        numbers = {**flatten(figures), "elapsed_s": elapsed_s, "size_bytes": float(artifact.size_bytes)}
        if peak_memory_mib is not None:
            numbers["peak_memory_mib"] = peak_memory_mib
        model_id = self._create_model(artifact, kind) if model else None
        self.flush()
        _log_metrics(self.run_id, numbers, model_id or (about.model_id if about else None))
        self.log_text(json.dumps(figures, indent=1), "metrics.json")
        if artifact.manifest.exists():
            self.log_file(artifact.manifest)
        if directory_to_log:
            client().log_artifacts(self.run_id, str(directory_to_log), directory_to_log.name)
        self.set_tags(
            {
                "slimline.kind": kind,
                "artifact.uri": artifact.uri,
                "artifact.sha256": artifact.sha256,
                "artifact.size_bytes": str(artifact.size_bytes),
            }
        )
        return StageResult(
            artifact=artifact,
            kind=kind,
            metrics=figures,
            elapsed_s=elapsed_s,
            peak_memory_mib=peak_memory_mib,
            run_id=self.run_id,
            model_id=model_id,
        )

    def _create_model(self, artifact: Artifact, kind: str) -> str:
        import mlflow
        from mlflow.entities import LoggedModelOutput

        client()  # points the function below at our server
        created = mlflow.create_external_model(
            name=re.sub(r"[/:.%\"']", "-", self._stage),
            source_run_id=self.run_id,
            tags={"sha256": artifact.sha256, "uri": artifact.uri},
            model_type=kind,
            experiment_id=self._parent.experiment,
        )
        client().log_outputs(self.run_id, [LoggedModelOutput(created.model_id, step=0)])
        return str(created.model_id)


def _thinned(points: list[tuple[int, int, dict[str, float]]], most: int) -> list[tuple[int, int, dict[str, float]]]:
    """At most `most` of the points, evenly spread, the last always among them."""
    stride = -(-len(points) // most) or 1
    return points[::-1][::stride][::-1]


# Lineage


def lineage(model: str) -> list[Ancestor]:
    """A model and all it was made from: every model stands before those it came from, the original last.

    The edges are the inputs and outputs of MLflow runs, so a stage served from the cache leads into the earlier flow
    run that did the work.

    Args:
        model: an MLflow model id ("m-..."), a registered version ("models:/name@candidate", "models:/name/3") or the
            SHA-256 of an artifact.

    Raises:
        ValueError: MLflow knows no such model.
    """
    known: dict[str, Ancestor] = {}
    order: list[Ancestor] = []

    def visit(model_id: str) -> None:
        if model_id not in known:
            known[model_id] = ancestor = _ancestor(model_id)
            for parent in ancestor.parents:
                visit(parent)
            order.append(ancestor)

    visit(_model_id(model))
    return order[::-1]


def _ancestor(model_id: str) -> Ancestor:
    found = _logged_model(model_id)
    parents: tuple[str, ...] = ()
    if found.source_run_id:
        inputs = client().get_run(found.source_run_id).inputs
        parents = tuple(dict.fromkeys(i.model_id for i in (inputs.model_inputs if inputs else None) or ()))
    return Ancestor(
        model_id=model_id,
        name=found.name,
        kind=found.model_type or "",
        sha256=found.tags.get("sha256"),
        uri=found.tags.get("uri"),
        run_id=found.source_run_id,
        parents=parents,
    )


def _logged_model(model_id: str) -> "LoggedModel":
    from mlflow.exceptions import MlflowException

    try:
        return client().get_logged_model(model_id)
    except MlflowException as error:
        raise ValueError(f"MLflow at {tracking_uri()} knows no model {model_id!r}: {error.message}") from None


def _model_id(model: str) -> str:
    if model.startswith("m-"):
        return model
    if model.startswith("models:/"):
        from infra.registry import find_version

        registered = find_version(model)
        if "model_id" not in registered.tags:
            raise ValueError(f"{model} was not registered by Slimline, so its lineage is not recorded.")
        return registered.tags["model_id"]
    found = client().search_logged_models(experiment_ids(), f"tags.sha256 = '{model}'", max_results=1)
    if not found:
        raise ValueError(f"MLflow at {tracking_uri()} knows no model whose artifact has the SHA-256 {model!r}.")
    return str(found[0].model_id)


# Writing


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and models under dotted names; sequences are leaves."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if not isinstance(value, Mapping):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def metric_name(name: str) -> str:
    """`name` with what MLflow does not allow in names of metrics, parameters and tags replaced by "_"."""
    return re.sub(r"[^\w.\- :/]", "_", name).strip("/")[:250]


def _json(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON lacks, as the strings that pydantic reads as floats."""
    if isinstance(value, dict):
        return {name: _json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def _log_metrics(run_id: str, leaves: Mapping[str, Any], model_id: str | None = None) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    numbers = [(metric_name(name), _number(value)) for name, value in leaves.items()]
    batch = [Metric(name, value, now, 0, model_id=model_id) for name, value in numbers if value is not None]
    for start in range(0, len(batch), 500):
        client().log_batch(run_id, metrics=batch[start : start + 500])


def _log_params(run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    batch = [
        Param(metric_name(name), value if isinstance(value, str) else json.dumps(to_jsonable_python(value)))
        for name, value in flatten(params).items()
    ]
    for start in range(0, len(batch), 100):
        client().log_batch(run_id, params=batch[start : start + 100])


def _set_tags(run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client().log_batch(run_id, tags=[RunTag(name, str(value)[:7000]) for name, value in tags.items()])
