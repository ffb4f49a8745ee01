import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra import registry
from infra.artifacts import new_directory, publish
from infra.hardware import hardware
from infra.sbom import SBOM
from infra.settings import environment, settings
from infra.signing import Unverified, check, key_id, signature_of, signing_key
from infra.tracking import StageResult, client, lineage, stage_run, start_flow
from tasks.engines import OnnxRuntime
from tasks.engines.compiling import compile_engine, load_generator
from tasks.engines.text import Sampling
from tests.homes import home_at
from tests.infra.asking import ask, ask_json, unused_port, wait_until

ROOT = Path(__file__).parents[2]
CODE = {"python_model": ROOT / "tasks" / "serving.py", "code_paths": [ROOT / "tasks", ROOT / "infra"]}
MODEL = "tiny"
WRONG_PARAMS = [
    ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater than or equal to 1; got 0."),
    ({"temperature": -1.0}, "temperature: Input should be greater than or equal to 0; got -1.0."),
    ({"stop": [""]}, "a text in `stop` must have a character"),
    ({"seed": "x"}, "seed"),
]
PROMPTS = ["def parse(", "The module"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    with home_at(tmp_path_factory.mktemp("home")) as where:
        yield where


@pytest.fixture(scope="module")
def parent(home):
    return start_flow("tiny", recipe_json='{"seed": 0}', tags={"prefect.flow_run_id": "f1"})


@pytest.fixture(scope="module")
def bundle(parent, tiny_checkpoint, tmp_path_factory) -> StageResult:
    """A real engine bundle of the tiny model, recorded as the stages would."""
    out = new_directory()
    shutil.copytree(tiny_checkpoint, out, dirs_exist_ok=True)
    with stage_run("import", parent, params={}) as run:
        original = run.finish(publish(out), kind="checkpoint", metrics={}, model=True)
    out, data, engine = new_directory(), tmp_path_factory.mktemp("data"), OnnxRuntime(precision="float32")
    np.save(data / "evaluation.npy", np.arange(64, dtype=np.int32)[None])
    compile_engine(checkpoint=original.artifact.path, data=data, engine=engine, threads=1, out=out)
    with stage_run("compile", parent, params={}, inputs=[original]) as run:
        return run.finish(publish(out), kind="engine", metrics={}, model=True)


@pytest.fixture(scope="module")
def version(parent, bundle):
    return registry.register(
        MODEL, bundle=bundle, parent=parent, verdict="ACCEPT", tags={"engine": "ort", "pass@1": "0.5"}, **CODE
    )


@pytest.fixture(scope="module")
def expected(bundle):
    generator = load_generator(bundle.artifact.path, threads=1)
    answers, _ = generator.answer([generator.encode(prompt) for prompt in PROMPTS], Sampling(max_new_tokens=8))
    return [answer.text for answer in answers]


def test_a_version_says_what_it_is_and_where_it_came_from(version, bundle, parent):
    assert version.uri == f"models:/{MODEL}@candidate"
    tags = client().get_model_version_by_alias(MODEL, "candidate").tags
    assert tags["sha256"] == bundle.artifact.sha256
    assert tags["verdict"] == "ACCEPT"
    assert tags["engine"] == "ort"
    assert tags["prefect.flow_run_id"] == "f1"
    assert tags["recipe.sha256"] == client().get_run(parent.run_id).data.tags["recipe.sha256"]
    assert [a.name for a in lineage(version.uri)] == [MODEL, "compile", "import"]
    assert tags["size_bytes"] == str(bundle.artifact.size_bytes)
    assert json.loads(tags["hardware"])["cpu"] == hardware()["cpu"]
    assert tags["flow_run_url"].endswith(f"/runs/{parent.run_id}?workflowType=machine_learning")
    assert tags["pass_1"] == "0.5"


def test_what_is_signed_says_what_the_tags_say(version):
    tags = client().get_model_version_by_alias(MODEL, "candidate").tags
    place = registry.verified_version(MODEL, version.version)
    facts = check(place, signature_of(place)).facts
    assert (facts.model, facts.verdict, facts.sha256) == (MODEL, "ACCEPT", tags["sha256"])
    assert facts.parents == (client().get_logged_model(original_of(version)).tags["sha256"],) == (tags["parents"],)
    assert facts.hardware == json.loads(tags["hardware"])
    assert hashlib.sha256((place / SBOM).read_bytes()).hexdigest() == facts.sbom_sha256 == tags["sbom_sha256"]
    assert facts.recipe_sha256 == tags["recipe.sha256"]
    assert key_id(signing_key().public_key()) == tags["signed_by"]


def test_a_description_that_postgresql_would_refuse_is_cut_at_a_line(parent):
    cut = registry._cut("line\n" * 2000)
    assert len(cut) <= 5000
    assert cut.endswith("line\n\n(The rest is in the report, with the flow's run.)")
    assert registry._cut("short") == "short"


def test_a_verdict_on_what_gets_no_version_is_found_in_mlflow(bundle, parent):
    registry.record_verdict(bundle, parent, verdict="REJECT", why="It is 3 % slower.", name="int8/onnxruntime")
    query = "tags.verdict = 'REJECT' and tags.candidate = 'int8/onnxruntime'"
    (found,) = client().search_logged_models([parent.experiment], query)
    assert found.model_id == bundle.model_id
    assert found.tags["verdict.why"] == "It is 3 % slower."
    assert found.tags["verdict.flow_run"] == parent.run_id
    elsewhere = bundle.model_copy(update={"model_id": "m-of-another-server"})
    registry.record_verdict(elsewhere, parent, verdict="REJECT", why="", name="")


def pins_of(version: registry.Version) -> list[str]:
    return (registry.verified_version(MODEL, version.version) / "requirements.txt").read_text().splitlines()


def brought_by(pins: list[str]) -> set[str]:
    """The distributions that pip installs for these, as those that are installed here require each other."""
    found, waiting = set(), [Requirement(pin) for pin in pins]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if name in found:
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):  # for another platform
            for each in map(Requirement, metadata.requires(name) or ()):
                if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                    waiting.append(each)
    return found


def link_distributions(names: set[str], site: Path) -> None:
    """A directory of packages with nothing but these distributions."""
    site.mkdir()
    for name in names:
        with suppress(metadata.PackageNotFoundError):  # for another platform
            found = metadata.distribution(name)
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(Path(str(found.locate_file(top))))


def original_of(version: registry.Version) -> str:
    return lineage(version.uri)[-1].model_id


def test_a_version_pins_published_versions_of_what_it_needs(version):
    pins = pins_of(version)
    assert f"onnxruntime=={metadata.version('onnxruntime')}" in pins
    assert not [pin for pin in pins if "+" in pin]


def test_the_same_bundle_gives_the_same_version(version, bundle):
    later = start_flow("tiny", recipe_json="{}", tags={})
    again = registry.register(MODEL, bundle=bundle, parent=later, verdict="ACCEPT", **CODE)
    assert again == version
    assert len(client().search_model_versions(f"name = '{MODEL}'")) == 1
    assert client().get_run(later.run_id).data.tags["registered_model"] == f"{MODEL}/{version.version}"


@pytest.mark.parametrize("verdict", ["REJECT", "INCONCLUSIVE", ""])
def test_what_was_not_accepted_gets_no_version_and_no_alias(verdict, bundle, parent):
    with pytest.raises(ValueError, match=f"the verdict on {bundle.artifact.sha256[:12]} is {verdict}"):
        registry.register("rejected", bundle=bundle, parent=parent, verdict=verdict, **CODE)
    assert not client().search_model_versions("name = 'rejected'")


def test_a_name_mlflow_cannot_store_is_refused(bundle, parent):
    with pytest.raises(ValueError, match="'a/b'"):
        registry.register("a/b", bundle=bundle, parent=parent, verdict="ACCEPT", **CODE)


def test_a_process_elsewhere_generates_with_what_the_version_brings_and_pins(version, expected, home, tmp_path):
    """There is no Slimline there, and of the libraries only what pip installs for the version's requirements."""
    site = tmp_path / "site"
    link_distributions(brought_by(pins_of(version)), site)
    code = (
        "import sys, json, mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "prompts, short = json.loads(sys.argv[2]), {'max_new_tokens': 8}\n"
        "warm = {**short, 'temperature': 2.0, 'seed': 3}\n"
        "print(json.dumps([model.predict(prompts, params=short), model.predict(prompts[0], params=short),\n"
        "    model.predict(pd.DataFrame({'prompt': prompts, 'id': [1, 2]}), params=short),\n"
        "    model.predict({'prompt': prompts}, params=short),\n"
        "    model.predict(prompts, params=warm), model.predict(prompts, params=warm)]))\n"
        "try: model.predict(pd.DataFrame({'id': ['a'], 'prompt': ['b']}))\n"
        "except ValueError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-W", "error::UserWarning:mlflow", "-c", code, version.uri, json.dumps(PROMPTS)],
        cwd=tmp_path,
        env=elsewhere(home, PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    listed, single, framed, mapped, warm, warm_again = json.loads(run.stdout.splitlines()[0])
    assert listed == framed == mapped == expected
    assert single == expected[:1]
    assert "must be 'prompt'; got 'id'" in run.stdout.splitlines()[1]
    assert warm == warm_again != expected


@pytest.mark.servers
def test_mlflow_models_serve_answers_with_generated_text(version, expected, home, tmp_path):
    port = unused_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow looks for uvicorn there
    serve = ["models", "serve", "-m", version.uri, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *serve],
            cwd=tmp_path,
            env=elsewhere(home, PATH=path),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}/invocations"
    try:
        wait_until(lambda: answers(server, tmp_path / "log", port), 120, "the scoring server")
        split = {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]}
        for body in ({"inputs": PROMPTS}, {"dataframe_split": split}):
            answer = ask_json(address, {**body, "params": {"max_new_tokens": 8}})
            assert answer["predictions"] == expected
        stop = expected[1][len(expected[1]) // 2 :]
        answer = ask_json(address, {"inputs": PROMPTS[1:], "params": {"max_new_tokens": 8, "stop": ["no", stop]}})
        assert answer["predictions"] == [expected[1][: expected[1].index(stop)]]
        for params, message in WRONG_PARAMS:
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                ask(address, {"inputs": PROMPTS, "params": params})
            assert message in refused.value.read().decode()
    finally:
        group = [p for p in psutil.process_iter() if in_group(p, server.pid)]
        for process in group:
            process.kill()
        server.wait()
        psutil.wait_procs(group, timeout=10)
    assert not any(in_group(p, server.pid) for p in psutil.process_iter())


def test_a_registered_checkpoint_is_downloaded_as_a_source(parent, tiny_checkpoint, tmp_path):
    uri = logged_files("plain", parent, tiny_checkpoint, "model")
    found = registry.download(uri, tmp_path)
    assert (found / "model.safetensors").read_bytes() == (tiny_checkpoint / "model.safetensors").read_bytes()
    assert (found / "tokenizer.json").exists()
    assert registry.fingerprint(uri) == registry.fingerprint(uri)


def test_a_registered_engine_is_no_source(version, tmp_path):
    with pytest.raises(ValueError, match=r"tiny@candidate holds none.*name the model it was compiled from"):
        registry.download(version.uri, tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nobody@candidate", "There is no models:/nobody@candidate.*Registered: .*tiny"),
        ("models:/tiny/99", "There is no models:/tiny/99"),
        ("models:/tiny", "models:/name@alias or models:/name/version; got 'models:/tiny'"),
    ],
)
def test_a_source_that_does_not_exist_is_named(version, uri, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        registry.download(uri, tmp_path)


def logged_files(name, parent, directory, inside) -> str:
    """Version 1 of `name`, holding the files of `directory` below `inside`, as other tools log them."""
    model = client().create_logged_model(parent.experiment, name=name)
    staged = new_directory()
    shutil.copytree(directory, staged / inside)
    client().log_model_artifacts(model.model_id, str(staged))
    client().finalize_logged_model(model.model_id, "READY")
    client().create_registered_model(name)
    client().create_model_version(name, source=f"models:/{model.model_id}", model_id=model.model_id)
    return f"models:/{name}/1"


def test_the_bundle_of_a_version_is_fetched_once_and_answers(version, expected):
    bundle = registry.verified_bundle(MODEL, version.version)
    generator = load_generator(bundle, threads=1)
    prompts = [generator.encode(prompt) for prompt in PROMPTS]
    answers, _ = generator.answer(prompts, Sampling(max_new_tokens=8))
    assert [answer.text for answer in answers] == expected
    found = (bundle / "manifest.json").stat()
    assert registry.bundle_at(version.uri) == bundle
    assert (bundle / "manifest.json").stat().st_ctime_ns == found.st_ctime_ns  # not fetched again
    with pytest.raises(ValueError, match="There is no models:/nothing@candidate"):
        registry.bundle_at("models:/nothing@candidate")


def test_a_damaged_copy_of_a_version_is_fetched_again(version, bundle):
    copy = registry.verified_bundle(MODEL, version.version)
    flip_a_bit(copy / "manifest.json")
    assert registry.verified_bundle(MODEL, version.version) == copy
    assert (copy / "manifest.json").read_bytes() == (bundle.artifact.path / "manifest.json").read_bytes()


@pytest.mark.parametrize("where", ["artifacts/files/manifest.json", "code/tasks/serving.py", "MLmodel"])
def test_a_version_that_was_changed_in_the_store_is_refused_whatever_was_changed(version, where):
    stored = in_the_store(version)
    flip_a_bit(stored / where)
    shutil.rmtree(settings().home / "versions", ignore_errors=True)
    try:
        with pytest.raises(Unverified, match=f"Version 1 of tiny must not be used. File {where} of .* was changed"):
            registry.bundle_at(version.uri)
    finally:
        flip_a_bit(stored / where)
    assert registry.bundle_at(version.uri).is_dir()


def test_a_served_version_that_was_changed_is_not_loaded(version):
    flip_a_bit(in_the_store(version) / "artifacts/files/tokenizer.json")
    try:
        with pytest.raises(Unverified, match=r"File artifacts/files/tokenizer.json of .* was changed after"):
            mlflow.pyfunc.load_model(version.uri)
    finally:
        flip_a_bit(in_the_store(version) / "artifacts/files/tokenizer.json")


def test_files_of_another_version_are_not_taken_for_this_one(version, parent):
    """Whoever may write to the registry points a version at files that were signed as another's."""
    source = client().get_model_version(MODEL, version.version)
    client().create_registered_model("other")
    client().create_model_version("other", source=source.source, tags=source.tags)
    with pytest.raises(Unverified, match="were signed as tiny with the bundle"):
        registry.bundle_at("models:/other/1")


def in_the_store(version: registry.Version) -> Path:
    model = client().get_logged_model(client().get_model_version(version.model, version.version).tags["model_id"])
    return Path(model.artifact_location.removeprefix("file://"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)


def elsewhere(home: Path, **changes: str) -> dict[str, str]:
    """The environment of a process that knows where the registry is and whose signatures count, and nothing else."""
    return environment(
        MLFLOW_TRACKING_URI=f"sqlite:///{home / 'mlflow.db'}",
        SLIMLINE_HOME=None,
        SLIMLINE_TRUSTED_KEYS=str(home / "keys" / "trusted.pem"),
        **{"PYTHONPATH": None, **changes},
    )


def answers(server: subprocess.Popen[bytes], log: Path, port: int) -> bool:
    """Whether a scoring server that has not ended is ready."""
    assert server.poll() is None, log.read_text()
    return ask(f"http://127.0.0.1:{port}/ping")[0] == 200


def in_group(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_models_beyond_a_page_of_mlflow_are_known_too(tmp_path):
    with home_at(tmp_path):
        for number in range(101):  # MLflow's page has 100
            client().create_registered_model(f"model-{number:03}")
        with pytest.raises(ValueError, match=r"model-000, .*model-100"):
            registry.find_model("another")
