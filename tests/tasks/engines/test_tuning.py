"""Tuning: what it chooses from given times, and that a bundle is used as it found."""

from pathlib import Path

import numpy as np
import pytest

from tasks.engines import Engine, OnnxRuntime, OpenVino, TensorRT, tuning
from tasks.engines.compiling import compile_engine, load_bundle, load_generator, read_manifest, tune_bundle
from tasks.engines.tuning import tune

WINDOWS = np.arange(40).reshape(2, 20)
OPENVINO = OpenVino(precision="float32")


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
        monkeypatch.setattr(OpenVino, "load", lambda self, bundle, *, threads: Session(self, threads))
        monkeypatch.setattr(tuning, "_time", lambda session, prompt, new_tokens: tuning._Timing(1.0, tpot_ms(session)))

    return use


def tuned(num_cores: int = 4):  # type: ignore[no-untyped-def]
    return tune(Path(), OPENVINO, windows=WINDOWS, num_cores=num_cores, processor="test")


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


def test_a_model_too_short_for_the_request_is_refused(given_times) -> None:
    given_times(lambda s: 1.0)
    with pytest.raises(ValueError, match="reads 190 tokens and writes 32; the model takes 200"):
        tune(Path(), OPENVINO, windows=WINDOWS, num_cores=1, processor="test", prompt_tokens=190)


def test_an_engine_without_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'tensorrt'"):
        tune(Path(), TensorRT(precision="float16"), windows=WINDOWS, num_cores=1, processor="test")


@pytest.mark.parametrize("engine", [OnnxRuntime(precision="float32"), OPENVINO])
def test_a_tuned_bundle_is_loaded_as_tuned(engine: Engine, tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """The model is tiny, so what wins is chance; whatever it is, loading uses it."""
    compile_engine(checkpoint=tiny_checkpoint, data=None, engine=engine, threads=1, out=tmp_path)
    assert read_manifest(tmp_path).tuned is None

    found = tune_bundle(bundle=tmp_path, num_cores=2)

    manifest = read_manifest(tmp_path)
    assert manifest.tuned == found
    assert {trial.setting for trial in found.trials} == {"threads", *tuning.SETTINGS[engine.engine]}
    assert all(trial.ttft_ms > 0 and trial.tpot_ms > 0 for trial in found.trials)
    assert manifest.tuned_engine == engine.model_copy(update=found.options)
    session, _ = load_bundle(tmp_path, threads=1)
    session.close()
    facts = load_generator(tmp_path, threads=None).runtime.facts
    assert str(found.threads) in (facts.get("threads"), facts.get("inference_num_threads"))
