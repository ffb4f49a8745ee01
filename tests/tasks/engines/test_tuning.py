"""Tuning: what it chooses from given times, and that a bundle is used as it found."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tasks.engines import Engine, OnnxRuntime, OpenVino, TensorRT, tuning
from tasks.engines.compiling import (
    MANIFEST,
    compile_engine,
    load_bundle,
    load_generator,
    num_cores,
    read_manifest,
    tune_bundle,
    tune_copy,
)
from tasks.engines.importing import ImportedSummary, import_bundle
from tasks.engines.tuning import Tuned, Tuning, tune
from tasks.validation import diagnosis
from tasks.validation.latency_worker import load

WINDOWS = np.arange(40).reshape(2, 20)
OPENVINO = OpenVino(precision="float32")
QUICK = Tuning(prompt_tokens=8, new_tokens=4, num_rounds=3)


class Session:
    """Answers the same always, or something else; only its name matters to the patched clock."""

    vocab_size = 50
    max_length = 200

    def __init__(self, engine: Engine, threads: int) -> None:
        self.engine, self.threads = engine, threads
        self.shift = 5 if getattr(engine, "precision", "") == "bfloat16" else 0

    def prefill(self, input_ids: np.ndarray, num_logits: int = 1) -> np.ndarray:
        return self._logits(input_ids[:, -num_logits:])

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        return self._logits(input_ids[:, None])[:, 0]

    def close(self) -> None: ...

    def _logits(self, tokens: np.ndarray) -> np.ndarray:
        return -(((np.arange(50) - tokens[..., None] - 1 - self.shift) % 50).astype(np.float32))


@pytest.fixture
def given_times(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes every session take the TPOT that a function says, and a hundredth of the TTFT."""

    def use(tpot_ms) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.setattr("tasks.engines.openvino._has_bfloat16", lambda: True)
        monkeypatch.setattr(OpenVino, "load", lambda self, bundle, *, threads: Session(self, threads))
        monkeypatch.setattr(tuning, "_time", lambda session, prompt, new_tokens: tuning._Timing(1.0, tpot_ms(session)))

    return use


def tuned(max_threads: int = 4):  # type: ignore[no-untyped-def]
    return tune(
        Path(), OPENVINO, Tuning(), windows=WINDOWS, max_threads=max_threads, num_cores=6, processor="Abacus 3000"
    )


def test_the_fastest_value_of_each_setting_is_kept(given_times) -> None:
    given_times(lambda s: 10.0 - (s.threads == 2) - (s.engine.kv_cache == "float16"))
    found = tuned()
    assert (found.threads, found.options) == (2, {"kv_cache": "float16"})
    assert [t.value for t in found.trials if t.setting == "threads"] == [4, 2, 1]
    assert [t.value for t in found.trials if t.setting == "kv_cache"] == ["uint8", "float16", "float32"]


def test_a_gain_as_small_as_noise_changes_nothing(given_times) -> None:
    given_times(lambda s: 10.0 - 0.2 * (s.threads == 1) - 0.2 * (s.engine.kv_cache == "float32"))
    assert (tuned().threads, tuned().options) == (4, {})


def test_a_setting_that_changes_answers_is_not_taken(given_times) -> None:
    given_times(lambda s: 10.0 - 5 * (s.engine.precision == "bfloat16"))
    found = tuned()
    assert found.options == {}
    assert "top1_agreement is 0.000" in next(t.refused for t in found.trials if t.value == "bfloat16")


def test_answers_are_compared_only_where_a_setting_would_win(given_times, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    compare = tuning.compare
    monkeypatch.setattr(tuning, "compare", lambda session, *_: asked.append(session.engine) or compare(session, *_))
    given_times(lambda s: 10.0 - 4 * (s.engine.kv_cache == "float16") + 4 * (s.engine.precision == "bfloat16"))
    assert tuned(max_threads=1).options == {"kv_cache": "float16"}
    assert [engine.kv_cache for engine in asked] == ["float16"]


def test_a_setting_that_the_processor_lacks_is_not_tried(given_times, monkeypatch: pytest.MonkeyPatch) -> None:
    given_times(lambda s: 10.0 - 5 * (s.engine.precision == "bfloat16"))
    monkeypatch.setattr("tasks.engines.openvino._has_bfloat16", lambda: False)
    assert [t.value for t in tuned().trials if t.setting == "precision"] == ["float32"]


def test_what_was_found_says_where_and_with_how_many_cores(given_times) -> None:
    given_times(lambda s: 10.0 - (s.threads == 2))
    found = tuned()
    assert (found.processor, found.num_cores, found.words) == ("Abacus 3000", 6, "threads 2")


def test_a_model_too_short_for_the_request_is_refused(given_times) -> None:
    given_times(lambda s: 1.0)
    with pytest.raises(ValueError, match="reads 190 tokens and writes 32; the model takes 200"):
        tune(Path(), OPENVINO, Tuning(prompt_tokens=190), windows=WINDOWS, max_threads=1, num_cores=1, processor="test")


def test_an_engine_without_settings_is_refused() -> None:
    engine = TensorRT(precision="float16")
    with pytest.raises(ValueError, match="got 'tensorrt'"):
        tune(Path(), engine, Tuning(), windows=WINDOWS, max_threads=1, num_cores=1, processor="test")


@pytest.mark.parametrize("engine", [OnnxRuntime(precision="float32"), OPENVINO])
def test_a_tuned_bundle_is_loaded_as_tuned(engine: Engine, tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """The model is tiny, so what wins is chance; whatever it is, loading uses it."""
    compile_engine(checkpoint=tiny_checkpoint, data=None, engine=engine, threads=1, out=tmp_path)
    assert read_manifest(tmp_path).tuned is None

    found = tune_bundle(bundle=tmp_path, max_threads=2, options=QUICK)

    manifest = read_manifest(tmp_path)
    assert manifest.tuned == found
    assert {trial.setting for trial in found.trials} == {"threads", *tuning.SETTINGS[engine.engine]}
    assert all(trial.ttft_ms > 0 and trial.tpot_ms > 0 for trial in found.trials)
    assert manifest.tuned_engine == engine.model_copy(update=found.options)
    session, _ = load_bundle(tmp_path, threads=1)
    session.close()
    facts = load_generator(tmp_path, threads=None).runtime.facts
    assert str(found.threads) in (facts.get("threads"), facts.get("inference_num_threads"))


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("compiled")
    return out, compile_engine(checkpoint=tiny_checkpoint, data=None, engine=OPENVINO, threads=1, out=out)


def test_a_copy_is_tuned_and_the_bundle_stays(compiled, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bundle, summary = compiled
    before = (bundle / MANIFEST).read_bytes()

    found = tune_copy(bundle=bundle, compiled=summary, options=QUICK, max_threads=2, out=tmp_path)

    assert (bundle / MANIFEST).read_bytes() == before
    assert read_manifest(tmp_path).tuned == found.tuned
    assert found.parity == summary.parity
    assert found.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) > summary.size_bytes
    assert {trial.value for trial in found.tuned.trials if trial.setting == "threads"} == {1, 2}


def _tuned(bundle: Path, out: Path, **changes: object) -> Path:
    """A copy of a bundle that says it was tuned, on this machine or on the one that `changes` name."""
    shutil.copytree(bundle, out, dirs_exist_ok=True)
    manifest = read_manifest(out)
    here = {"processor": manifest.processor, "num_cores": num_cores(), "threads": 1}
    options = {"options": {"kv_cache": "float32"}, "prompt_tokens": 8, "new_tokens": 4, "trials": ()}
    found = manifest.model_copy(update={"tuned": Tuned(**here | options | changes)})
    (out / MANIFEST).write_text(found.model_dump_json())
    return out


def _facts(bundle: Path, threads: int) -> dict[str, str]:
    """What a bundle's engine was made with, where its speed is measured."""
    _, session = load(bundle, original=False, threads=threads)
    return session.facts  # type: ignore[union-attr]


def test_measuring_uses_what_was_found_here(compiled, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    facts = _facts(_tuned(compiled[0], tmp_path), threads=2)
    assert (facts["inference_num_threads"], facts["key_cache_precision"]) == ("1", "f32")
    facts = _facts(compiled[0], threads=2)
    assert (facts["inference_num_threads"], facts["key_cache_precision"]) == (str(min(2, num_cores())), "u8")


def test_an_imported_bundle_says_what_compiling_said_of_its_size_and_how_it_is_loaded(  # type: ignore[no-untyped-def]
    compiled, tmp_path: Path
) -> None:
    bundle, summary = compiled

    def imported(source: Path, name: str) -> ImportedSummary:
        (tmp_path / name).mkdir()
        return import_bundle(bundle=source, out=tmp_path / name)

    plain = imported(bundle, "plain")
    assert (plain.size_bytes, plain.engine_size_bytes) == (summary.size_bytes, summary.engine_size_bytes)
    assert plain.tuned is None
    here = imported(_tuned(bundle, tmp_path / "tuned-here"), "here")
    assert here.tuned is not None
    assert here.tuned.words == "threads 1, kv_cache float32"
    elsewhere = _tuned(bundle, tmp_path / "tuned-elsewhere", processor="Abacus 3000")
    assert imported(elsewhere, "elsewhere").tuned is None


@pytest.mark.parametrize(
    ("where", "expected"),
    [({}, ("float32", 1)), ({"processor": "Abacus 3000"}, ("uint8", 2))],
    ids=["here", "elsewhere"],
)
def test_a_diagnosis_is_of_what_was_measured(  # type: ignore[no-untyped-def]
    compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: dict[str, object], expected: tuple[str, int]
) -> None:
    asked = []
    monkeypatch.setattr(
        diagnosis, "read_operators", lambda bundle, engine, prompt, threads: asked.append((engine.kv_cache, threads))
    )
    np.save(tmp_path / "evaluation.npy", WINDOWS.astype(np.int32))
    bundle = _tuned(compiled[0], tmp_path / "bundle", **where)
    diagnosis.examine(bundle=bundle, checkpoint=None, original=None, data=tmp_path, threads=2, out=tmp_path)
    assert asked == [expected]


@pytest.mark.parametrize("elsewhere", [{"processor": "Abacus 3000"}, {"num_cores": num_cores() + 1}])
def test_what_was_found_elsewhere_is_not_used_and_one_warning_says_so(  # type: ignore[no-untyped-def]
    compiled, tmp_path: Path, caplog: pytest.LogCaptureFixture, elsewhere: dict[str, object]
) -> None:
    bundle = _tuned(compiled[0], tmp_path, **elsewhere)
    assert _facts(bundle, threads=1)["key_cache_precision"] == "u8"
    caplog.clear()

    facts = load_bundle(bundle, threads=1)[0].facts

    assert (facts["inference_num_threads"], facts["key_cache_precision"]) == ("1", "u8")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "was tuned on" in said[0]
    assert "the settings it was compiled with are used" in said[0]
    facts = load_generator(bundle, threads=None).runtime.facts
    assert str(num_cores()) in (facts.get("threads"), facts.get("inference_num_threads"))
