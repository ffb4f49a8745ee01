import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from infra import tracking
from infra.artifacts import new_directory, publish
from infra.settings import environment, settings
from infra.tracking import StageResult, StageRun, client, end_flow, lineage, stage_run, start_flow


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMLINE_HOME", str(tmp_path_factory.mktemp("home")))
        settings.cache_clear()
        yield
    settings.cache_clear()


@pytest.fixture
def parent():
    return start_flow("tiny", recipe_json='{"seed": 1, "validation": {"speed": {"batch": 8}}}', tags={})


def artifact(text: str):
    directory = new_directory()
    (directory / "weights").write_text(text)
    return publish(directory)


def model(stage, parent, *inputs, text=None) -> StageResult:
    with stage_run(stage, parent, params={}, inputs=inputs) as run:
        return run.finish(artifact(text or stage), kind="checkpoint", metrics={}, model=True)


def data_of(run_id):
    return client().get_run(run_id).data


def files_of(run_id, directory=None):
    return {file.path for file in client().list_artifacts(run_id, directory)}


def test_an_interrupt_ends_no_write_half_way():
    class Slow:
        written: list[str] = []  # noqa: RUF012  one instance

        def write(self, text: str) -> None:
            time.sleep(0.5)
            self.written.append(text)

    slow = tracking._Undisturbed(Slow())
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            slow.write("first")
    finally:
        signal.signal(signal.SIGALRM, before)
    slow.write("how it ended")
    assert Slow.written == ["first", "how it ended"]


def test_a_flow_run_keeps_its_recipe_hardware_versions_and_commit(parent):
    assert files_of(parent.run_id) == {"recipe.json", "hardware.json", "versions.json"}
    run = client().get_run(parent.run_id)
    assert run.data.params == {"seed": "1", "validation.speed.batch": "8"}
    assert run.info.status == "RUNNING"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tracking.ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert run.data.tags["mlflow.source.git.commit"] == head.stdout.strip()


def test_a_retried_flow_run_finds_its_run_and_closes_what_died_in_it():
    tags = {"prefect.flow_run_id": "f1"}
    first = start_flow("tiny", recipe_json="{}", tags=tags)
    died = client().create_run(first.experiment, tags={"mlflow.parentRunId": first.run_id}).info.run_id
    end_flow(first, "FAILED")
    assert start_flow("tiny", recipe_json="{}", tags=tags) == first
    assert client().get_run(first.run_id).info.status == "RUNNING"
    assert client().get_run(died).info.status == "KILLED"
    assert start_flow("tiny", recipe_json="{}", tags={"prefect.flow_run_id": "f2"}) != first


def test_the_run_of_a_killed_process_does_not_stay_running():
    code = (
        "import os, signal\n"
        "from infra.tracking import start_flow, stage_run\n"
        "parent = start_flow('dies', recipe_json='{}', tags={})\n"
        "with stage_run('distill', parent, params={}) as run:\n"
        "    print(parent.run_id, run.run_id, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", code], cwd=tracking.ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    flow, stage = died.stdout.split()
    assert client().get_run(flow).info.status == "RUNNING"
    start_flow("next", recipe_json="{}", tags={})
    assert client().get_run(flow).info.status == "KILLED"
    assert client().get_run(stage).info.status == "KILLED"


def test_using_tracking_prints_nothing(tmp_path):
    code = (
        "from infra.tracking import start_flow, end_flow, stage_run\n"
        "from infra.artifacts import new_directory, publish\n"
        "parent = start_flow('quiet', recipe_json='{}', tags={})\n"
        "with stage_run('prune', parent, params={}) as run:\n"
        "    out = new_directory(); (out / 'a').write_text('a')\n"
        "    run.finish(publish(out), kind='checkpoint', metrics={'x': 1}, model=True)\n"
        "end_flow(parent, 'FINISHED')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tracking.ROOT,
        env=environment(SLIMLINE_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout + run.stderr == ""


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("too thin: 3"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(), "KILLED")],
)
def test_an_attempt_ends_as_it_ended(parent, raised, status):
    with pytest.raises(type(raised)), stage_run("prune", parent, params={}) as run:
        raise raised
    found = client().get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags["error"] == f"{type(raised).__name__}: {raised}"
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id


def test_figures_are_flattened_and_kept_whole(parent):
    class Error(BaseModel):
        mean: float
        worst: float

    class Summary(BaseModel):
        error: Error
        sparsity: float
        accepted: bool
        method: str
        per_layer: list[float]

    value = Summary(
        error=Error(mean=0.5, worst=float("inf")), sparsity=0.3, accepted=True, method="wanda", per_layer=[1.0, 2.0]
    )
    made = artifact("figures")
    with stage_run("prune", parent, params={"pruning": {"sparsity": 0.3, "layers": [1, 2]}, "seed": 1}) as run:
        result = run.finish(made, kind="checkpoint", metrics=value, peak_memory_mib=12.5)
    data = data_of(run.run_id)
    numbers = {
        name: data.metrics[name] for name in ("error.mean", "sparsity", "accepted", "peak_memory_mib", "size_bytes")
    }
    assert numbers == {"error.mean": 0.5, "sparsity": 0.3, "accepted": 1.0, "peak_memory_mib": 12.5, "size_bytes": 7}
    assert data.metrics["error.worst"] > 1e300  # SQLite has no infinity; MLflow stores the largest double
    assert not any(name.startswith(("per_layer", "method")) for name in data.metrics)
    assert data.params == {"pruning.sparsity": "0.3", "pruning.layers": "[1, 2]", "seed": "1"}
    assert Summary.model_validate(result.metrics) == value
    assert StageResult.model_validate_json(result.model_dump_json()) == result
    kept = json.loads(Path(client().download_artifacts(run.run_id, "metrics.json")).read_text())
    assert kept == result.metrics
    assert Path(client().download_artifacts(run.run_id, "manifest.json")).read_bytes() == made.manifest.read_bytes()
    assert data.tags["artifact.sha256"] == made.sha256
    assert data.tags["artifact.uri"] == made.uri


def test_live_curves_are_written_while_the_stage_runs_and_keep_the_last_point(parent, monkeypatch):
    writes = []
    monkeypatch.setattr(StageRun, "_write", lambda self, write=StageRun._write: (writes.append(1), write(self)))
    with stage_run("distill", parent, params={}) as run:
        run.progress(0, 5000, {"loss": 5.0})
        assert client().get_metric_history(run.run_id, "loss")[0].value == 5.0
        started_at = time.monotonic()
        for step in range(1, 5000):
            run.progress(step, 5000, {"loss": 5.0 - step / 1000, "tokens/s": 7.0})
        elapsed_s = time.monotonic() - started_at
        assert len(writes) <= 2 + elapsed_s
    curve = client().get_metric_history(run.run_id, "loss")
    assert (curve[-1].step, curve[-1].value) == (4999, pytest.approx(0.001))
    assert [point.step for point in curve] == sorted({point.step for point in curve})
    assert len(curve) <= 1 + (2 + elapsed_s) * tracking.POINTS_PER_WRITE
    assert data_of(run.run_id).metrics["tokens/s"] == 7.0


def test_points_that_fail_to_be_written_are_written_later(parent, monkeypatch):
    with stage_run("distill", parent, params={}) as run:
        with monkeypatch.context() as broken:
            broken.setattr(tracking, "client", lambda: (_ for _ in ()).throw(OSError("database is locked")))
            run.progress(1, 2, {"loss": 4.0})
        run.progress(2, 2, {"loss": 3.0})
    assert [point.value for point in client().get_metric_history(run.run_id, "loss")] == [4.0, 3.0]


def test_data_sets_are_inputs_with_their_digest(parent):
    with stage_run("prepare-data", parent, params={}) as run:
        data = run.finish(artifact("tokens"), kind="data", metrics={"num_tokens": 9})
    with stage_run("distill", parent, params={}, inputs=[data]) as run:
        run.log_dataset("stdlib", "e3b0c442" * 8, "package:stdlib", context="training")
    found = {i.dataset.name: i for i in client().get_run(run.run_id).inputs.dataset_inputs}
    assert found["data"].dataset.digest == data.artifact.sha256[:36]
    assert json.loads(found["data"].dataset.source)["sha256"] == data.artifact.sha256
    assert json.loads(found["data"].dataset.profile) == {"num_tokens": 9}
    assert [tag.value for tag in found["stdlib"].tags] == ["training"]


def test_lineage_leads_from_the_engine_to_the_original_also_through_an_earlier_flow_run(parent):
    original = model("import", parent)
    student = model("distill", parent, original)
    later = start_flow("tiny", recipe_json="{}", tags={})  # the stages above come from the cache here
    pruned = model("prune", later, StageResult.model_validate_json(student.model_dump_json()))
    recovered = model("recover", later, pruned, student)  # the teacher is an input too
    engine = model("compile", later, model("quantize", later, recovered), text="bundle")

    names = [ancestor.name for ancestor in lineage(engine.model_id)]
    assert names == ["compile", "quantize", "recover", "prune", "distill", "import"]
    assert lineage(engine.artifact.sha256) == lineage(engine.model_id)
    by_name = {ancestor.name: ancestor for ancestor in lineage(engine.model_id)}
    assert set(by_name["recover"].parents) == {pruned.model_id, student.model_id}
    assert by_name["import"].parents == ()
    assert by_name["distill"].run_id == student.run_id
    assert by_name["distill"].sha256 == student.artifact.sha256
    outputs = client().get_run(student.run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [student.model_id]


def test_lineage_of_something_unknown_says_so():
    with pytest.raises(ValueError, match="knows no model 'm-nothing'"):
        lineage("m-nothing")
    with pytest.raises(ValueError, match="SHA-256 'abc'"):
        lineage("abc")


def test_an_input_that_mlflow_lost_is_no_reason_to_fail(parent, caplog):
    lost = model("import", parent).model_copy(update={"model_id": "m-lost"})
    student = model("distill", parent, lost)
    assert [ancestor.name for ancestor in lineage(student.model_id)] == ["distill"]
    assert "m-lost" in caplog.text


def test_figures_measured_on_a_model_are_found_at_the_model(parent):
    engine = model("compile", parent)
    with stage_run("quality", parent, params={}, inputs=[engine]) as run:
        run.finish(artifact("items"), kind="measurement", metrics={"perplexity": 17.5}, about=engine)
    found = client().search_logged_models([parent.experiment], "metrics.perplexity < 18")
    assert [m.model_id for m in found] == [engine.model_id]


def test_a_database_interrupted_while_it_was_made_is_made_anew(tmp_path, monkeypatch):
    import mlflow.store.db.utils as database

    def interrupted(engine) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE experiments (half INTEGER)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database, "_initialize_tables", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracking.prepare_database(tmp_path)
    uri = tracking.prepare_database(tmp_path)
    assert tracking.prepare_database(tmp_path) == uri  # and brought up to date, which it is
    assert tracking._connect(uri).create_experiment("works")


def _record(home: str, results) -> None:
    os.environ["SLIMLINE_HOME"] = home
    settings.cache_clear()
    tracking._connect.cache_clear()
    parent = start_flow("race", recipe_json="{}", tags={})
    end_flow(parent, "FINISHED", {"done": 1})
    results.put(client().get_run(parent.run_id).info.status)


@pytest.mark.slow
def test_processes_that_open_a_fresh_database_at_once_all_work(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_record, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [results.get(timeout=1) for _ in processes] == ["FINISHED"] * 2
