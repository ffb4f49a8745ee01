"""One bundle against another, through the command line; and a candidate that its fake quantization makes slower."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from flows.validating import plan_validation
from tasks.engines import OnnxRuntime
from tasks.engines.compiling import compile_engine
from tests.flows.command_line import slimline
from tests.flows.recipes import data

DATA = data(training_tokens=20_000)


@pytest.fixture(scope="module")
def bundle(wide_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "float"
    out.mkdir()
    compile_engine(checkpoint=wide_checkpoint, data=None, engine=OnnxRuntime(precision="float32"), threads=1, out=out)
    return out


@pytest.fixture(scope="module")
def fake_quantized(bundle) -> Path:
    """The same bundle as training with fake quantization is often exported: rounded weights that nothing fuses.

    Weights lie [in, out] with a scale per output, as torch exports x @ W. ONNX Runtime rounds them once, when it loads
    the graph, and turns them back into floats for every token; along the last axis it does so number by number, which
    took 9 times as long as all of a token in floats (ONNX Runtime 1.31, one thread of an x86-64 server).
    """
    import onnx
    from onnx import helper, numpy_helper

    out = bundle.with_name("fake-quantized")
    shutil.copytree(bundle, out)
    model = onnx.load(out / "model.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in [node for node in model.graph.node if node.op_type == "FusedMatMul"]:
        weight = numpy_helper.to_array(weights[node.input[1]]).T
        names = [f"{node.input[1]}.{part}" for part in ("transposed", "scale", "zero_point")]
        scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
        for name, value in zip(names, (weight, scale, np.zeros(scale.shape, np.int8)), strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        rounded, restored = f"{names[0]}.rounded", f"{names[0]}.restored"
        nodes.append(helper.make_node("QuantizeLinear", names, [rounded], name=rounded, axis=1))
        nodes.append(helper.make_node("DequantizeLinear", [rounded, *names[1:]], [restored], name=restored, axis=1))
        node.input[1] = restored
        del node.attribute[:]  # transB
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (out / "model.weights").unlink()
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.weights", size_threshold=1024)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"] = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def rejected(bundle, fake_quantized, home) -> subprocess.CompletedProcess[str]:
    recipe = {
        "name": "any",
        "source": "any",
        "candidates": {"any": {}},
        "engines": [{"engine": "onnxruntime", "precision": "float32"}],
        "data": DATA,
        "validation": {"speed": {"prompt_tokens": 32, "new_tokens": 16, "batch_sizes": [1], "num_blocks": 12}},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--recipe", str(home / "recipe.yaml"), "--limit", "never_slower_than=[original]"]
    return slimline("validate", str(fake_quantized), "--against", str(bundle), *arguments, home=home)


def figures(said: str) -> dict:
    return json.loads(Path(re.search(r"figures\s+(/\S+\.json)", said)[1]).read_text())


def test_fake_quantized_weights_are_rejected_with_the_right_diagnosis(rejected):
    assert rejected.returncode == 3, rejected.stderr
    (row,) = figures(rejected.stdout)["rows"]
    assert row["judgement"]["verdict"] == "REJECT"
    (check,) = row["judgement"]["checks"]
    assert check["figure"] == "speedup_over_original.batch_1"
    findings = row["diagnosis"]["findings"]
    assert findings[0]["kind"] == "restored weights"
    assert "9 operators (DequantizeLinear)" in findings[0]["sentence"]
    page = Path(re.search(r"report\s+(/\S+\.html)", rejected.stdout)[1]).read_text()
    assert "turned back into floats for every token" in page


def test_the_original_is_the_other_bundle(rejected):
    assert "original (ONNX Runtime)" in rejected.stdout
    found = figures(rejected.stdout)
    assert found["original_engine"] == "ONNX Runtime float32"
    assert found["speed"]["subjects"]["original"]["size_bytes"] == found["original_size_bytes"]
    assert found["command"].startswith("slimline validate ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["validation.speed.num_block=3"], r"num_block\b"),
        (["validation.limits.never_slower_than=[unquantized]"], "write `original`"),
        (["validation"], "--set path=value; got 'validation'"),
        (["validation.if_inconclusive.max_rounds=2"], "measures once; got 'validation.if_inconclusive.max_rounds=2'"),
    ],
)
def test_an_option_that_is_none_is_refused(bundle, options, message):
    with pytest.raises(ValueError, match=message):
        plan_validation(str(bundle), "any", recipe=None, options=options)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        plan_validation(str(tmp_path), "any", recipe=None, options=[])


def test_a_limit_that_this_machine_cannot_judge_is_refused_with_the_reason(bundle):
    with pytest.raises(
        ValueError, match=r"cannot judge the limits: limits\.peak_gpu_memory_mib is of engines on a GPU"
    ):
        plan_validation(str(bundle), "source", recipe=None, options=["validation.limits.peak_gpu_memory_mib.max=100"])


def test_options_change_the_recipes_data_and_validation(bundle):
    planned, directory = plan_validation(
        str(bundle), "source", recipe=None, options=["data.num_evaluation_windows=9", "validation.speed=null"]
    )
    assert directory == bundle
    assert planned.source == "source"
    assert list(planned.candidates) == ["float"]
    assert planned.data.num_evaluation_windows == 9
    assert planned.validation.speed is None


@pytest.fixture(scope="module")
def accepted(rejected, bundle, fake_quantized, home) -> subprocess.CompletedProcess[str]:
    """Another limit; all that was measured comes from the cache."""
    arguments = ["--recipe", str(home / "recipe.yaml"), "--limit", "perplexity.max_degradation_percent=5"]
    return slimline("validate", str(fake_quantized), "--against", str(bundle), *arguments, home=home)


def test_what_keeps_its_limit_ends_with_exit_code_0_and_was_not_measured_again(accepted):
    assert accepted.returncode == 0, accepted.stderr
    done = [line for line in accepted.stderr.splitlines() if line.strip().startswith("done")]
    assert all(line.rstrip().endswith("cached") for line in done), accepted.stderr


def test_runs_are_compared_on_one_page_without_measuring(accepted, home):
    runs = [path.stem.rpartition("-")[2] for path in (home / "reports").glob("validate-*.html")]
    assert len(runs) == 2
    unknown = slimline("compare", *runs, home=home)
    assert unknown.returncode == 2
    ids = re.findall(r"([0-9a-f]{32}) \(validate", unknown.stderr)
    assert len(ids) == 2, unknown.stderr
    both = slimline("compare", *ids, home=home)
    assert both.returncode == 0, both.stderr
    assert "not comparable" not in both.stdout
    assert len(figures(both.stdout)["rows"]) == 3  # each run's bundle, and the other run's original
    page = Path(re.search(r"report\s+(/\S+\.html)", both.stdout)[1]).read_text()
    for run in ids:
        assert f"{run[:6]}: fake-quantized" in page
