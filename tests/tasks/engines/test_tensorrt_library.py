"""What is asked of the library, with the real one: the builder of TensorRT for RTX needs no GPU."""

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.engines import TensorRT, tensorrt_library
from tasks.engines.decoder import Decoder, read_decoder
from tasks.engines.export import export_decoder
from tasks.engines.tensorrt_library import (
    build_plan,
    configure,
    diagnosed,
    first_gpu,
    import_library,
    listener,
    module_of,
    not_built,
    products,
    read_cache,
    too_old,
    unreadable,
    unusable,
    use_timing_cache,
    write_cache,
)
from tasks.engines.tensorrt_plan import Profile, profiles

OPTIONS = TensorRT(precision="float16", max_batch_size=4, max_prompt=64, max_length=96)
needs_builder = pytest.mark.skipif(unusable("tensorrt_rtx") is not None, reason=str(unusable("tensorrt_rtx")))


def shapes(decoder: Decoder) -> tuple[Profile, Profile]:
    return profiles(decoder, max_batch_size=4, max_prompt=64, max_length=96)


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("library", "version", "message"),
    [
        ("tensorrt", "10.12.0.36", None),
        ("tensorrt", "11.4.0.106", None),
        ("tensorrt", "10.9.0.34", r"TensorRT must be 10\.12 or later; 10\.9\.0\.34 is installed"),
        ("tensorrt", "8.6.1", r"10\.12 or later; 8\.6\.1 .*pip install --upgrade 'slimline\[tensorrt\]'"),
        ("tensorrt_rtx", "1.7.1.116", None),
        ("tensorrt_rtx", "1.6.1", r"TensorRT for RTX must be 1\.7 or later; 1\.6\.1 is installed"),
    ],
)
def test_old_libraries_are_refused_by_their_number(library: Any, version: str, message: str | None) -> None:
    problem = too_old(library, version)
    assert (problem is None) == (message is None)
    if message:
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem)


def test_old_package_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    monkeypatch.setattr(tensorrt_library, "distribution_version", lambda name: {"tensorrt": "10.3.0"}[name])
    assert "10.3.0 is installed" in str(unusable("tensorrt"))


def test_old_module_is_refused_whatever_its_package_says(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "__version__", "1.2.0.54")
    with pytest.raises(ValueError, match=r"1\.7 or later; 1\.2\.0\.54 is installed"):
        import_library("tensorrt_rtx")


def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else object())
    assert unusable("tensorrt_rtx") == (
        "The engine 'tensorrt' needs tensorrt_rtx. Install it: pip install 'slimline[tensorrt-rtx]'"
    )


def test_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(tensorrt_library.ctypes, "CDLL", absent)
    assert first_gpu.__wrapped__() is None


@needs_builder
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"layers.2.gate.sigmoid": "BitwiseNot"},
            r"1 node\(s\).*BitwiseNot 'layers\.2\.gate\.sigmoid' \(model\.layers\.2\.mlp\.gate_proj\): TensorRT has no",
        ),
        (
            {"layers.0.up": "MatMulInteger", "mask.bias": "StringNormalizer"},
            r"2 node\(s\).* 'mask\.bias' \(the attention mask\): .* 'layers\.0\.up' \(model\.layers\.0\.mlp\.up_proj\)",
        ),
        (
            {"layers.1.q": "NoSuchOperator"},
            r"NoSuchOperator 'layers\.1\.q' \(model\.layers\.1\.self_attn\.q_proj\): TensorRT has no such",
        ),
    ],
)
def test_operators_that_tensorrt_lacks_are_named_with_their_modules(
    tiny_checkpoint: Path, tmp_path: Path, broken: dict[str, str], message: str
) -> None:
    import onnx

    decoder = read_decoder(tiny_checkpoint)
    export_decoder(decoder, tmp_path / "m.onnx", precision="float16", max_length=96)
    model = onnx.load(tmp_path / "m.onnx")
    for node in model.graph.node:
        node.op_type = broken.get(node.name, node.op_type)
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=message):
        build_plan(tmp_path / "broken.onnx", shapes(decoder), OPTIONS)


@needs_builder
def test_weights_that_do_not_fit_are_named_with_their_module(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import onnx

    decoder = read_decoder(tiny_checkpoint)
    export_decoder(decoder, tmp_path / "m.onnx", precision="float16", max_length=96)
    model = onnx.load(tmp_path / "m.onnx")
    (node,) = (node for node in model.graph.node if node.name == "layers.3.down")
    node.input[1] = "layers.3.up.weight"
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"\(model\.layers\.3\.mlp\.down_proj\): its inputs do not fit") as raised:
        build_plan(tmp_path / "broken.onnx", shapes(decoder), OPTIONS)
    assert "cudaError" not in str(raised.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_every_node_of_the_graph_has_a_module(
    family_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    import onnx
    from safetensors import safe_open

    checkpoint = family_checkpoint(family)
    export_decoder(read_decoder(checkpoint), tmp_path / "m.onnx", precision="float16", max_length=96)
    nodes = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.node
    found = {node.name: module_of(node.name) for node in nodes}
    assert not [name for name, module in found.items() if module == "no module of the model"]
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        modules = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118 not a dict
    assert modules <= set(found.values()) | {"model.embed_tokens"}


@needs_builder
def test_options_reach_the_builder(rtx: Any) -> None:
    config = rtx.Builder(listener(rtx)).create_builder_config()
    configure(rtx, config, TensorRT(precision="float32", compute_capabilities=("8.6", "12.0")))
    assert not config.get_flag(rtx.BuilderFlag.TF32)
    assert not config.get_flag(rtx.BuilderFlag.REFIT)
    assert config.num_compute_capabilities == 2
    assert config.get_compute_capability(1) == rtx.ComputeCapability.SM120

    config = rtx.Builder(listener(rtx)).create_builder_config()
    options = TensorRT(
        precision="float32",
        library="tensorrt",
        refit=True,
        strip_weights=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
    )
    configure(rtx, config, options)  # the same classes as enterprise TensorRT's, as far as these go
    for flag in ("REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE"):
        assert config.get_flag(getattr(rtx.BuilderFlag, flag))
    assert config.num_compute_capabilities == 0


@needs_builder
@pytest.mark.filterwarnings(
    "ignore:Use Deprecated:DeprecationWarning"
)  # TensorRT for RTX keeps the call and no timings
def test_timing_cache_is_kept_in_its_file(rtx: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "timings"
    config = rtx.Builder(listener(rtx)).create_builder_config()
    timings = use_timing_cache(config, file)
    content = bytes(timings.serialize())
    write_cache(file, content)
    assert read_cache(file) == content
    assert use_timing_cache(config, file) is not None


def test_cache_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    assert read_cache(file) == b""
    write_cache(file, b"first")
    write_cache(file, b"second")
    assert read_cache(file) == b"second"
    assert list(tmp_path.iterdir()) == [file]


@needs_builder
def test_bits_of_a_refused_plan_are_told_in_words(rtx: Any) -> None:
    bits = rtx.EngineInvalidityDiagnostics
    assert diagnosed(rtx, int(bits.VERSION_MISMATCH)) == ["another version built it"]
    assert diagnosed(rtx, int(bits.UNSUPPORTED_CC) | int(bits.OLD_CUDA_DRIVER)) == [
        "it was not built for this GPU's compute capability",
        "the CUDA driver is too old",
    ]
    assert set(tensorrt_library.DIAGNOSTICS) == set(bits.__members__)
    assert "too little memory" in unreadable(diagnosed(rtx, int(bits.INSUFFICIENT_GPU_MEMORY))[0])


@pytest.mark.parametrize(
    "told",
    [
        "Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "Error Code 1: Cuda Runtime (In allocate at x.cpp:1 (cudaError 2: out of memory))",
    ],
)
def test_too_little_memory_is_told_apart_from_other_failures(told: str) -> None:
    assert "smaller max_batch_size" in not_built(told)
    assert "more memory than the GPU has free" in unreadable(told)


def test_other_failures_keep_their_reason() -> None:
    told = "Error Code 1: Cuda Runtime (In x at y.cpp:1 (cudaError 209: no kernel image))"
    assert not_built(told) == f"TensorRT parses the graph but cannot build a plan from it: {told}."
    assert "for the GPU, that are to run it" in unreadable(told)


LAYERS = """Layers:
Name: shape, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: layers.0.v+layers.0.k_myl0_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,64], Datatype: Int8, \
Format: (Linear) }], Constants: [ { Name: w, Datatype: Int8 }, { Name: alpha, Datatype: Float }], Outputs: [ \
{ Name: y, Datatype: Half }], TacticName: t
Name: layers.0.scores, LayerType: gemm, Inputs: [ { Name: q, Datatype: Half }, { Name: k, Datatype: Half }], \
Constants: [ { Name: alpha, Datatype: Float }], Outputs: [ { Name: y, Datatype: Half }], TacticName: t
Name: __myl_ReplCastMulCastFc_myl0_33, LayerType: runtime_fusion, Inputs: [ { Name: x, Datatype: Half }], Constants: \
[ { Name: w, Datatype: Int4 }, { Name: s, Datatype: Half }], Outputs: [ { Name: y, Datatype: Half }], TacticName: t
Name: __myl_CastMulCast_myl0_4, LayerType: kgen, Inputs: [ { Name: x, Datatype: Half }], Constants: [ { Name: w, \
Datatype: Int4 }], Outputs: [ { Name: y, Datatype: Half }], TacticName: t"""


def test_products_are_counted_by_what_they_read() -> None:
    assert products([LAYERS]) == {"Half × Half": 1, "Half × Int4": 1, "Int8 × Int8": 1}
    assert products([]) == {}
    assert products(["Layers:\nName: x, LayerType: gemm, Inputs: [], Constants: [], Outputs: []"]) == {}


@needs_builder
def test_second_build_of_a_process_is_told_its_own_errors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    decoder = read_decoder(tiny_checkpoint)
    export_decoder(decoder, tmp_path / "m.onnx", precision="float16", max_length=96)
    (tmp_path / "nonsense.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"TensorRT cannot read"):
        build_plan(tmp_path / "nonsense.onnx", shapes(decoder), OPTIONS)
    built = build_plan(tmp_path / "m.onnx", shapes(decoder), OPTIONS)
    assert built.version == import_library("tensorrt_rtx").__version__
    assert sum(built.products.values()) >= 2 * (4 * 5 + 1)  # two phases; q, k, v may be one kernel, gate and up too


def exists(module: Any, name: str) -> bool:
    """Whether "Class" or "Class.member" is there."""
    owner, _, member = name.partition(".")
    return hasattr(module, owner) and (not member or hasattr(getattr(module, owner), member))


def test_docs_map_calls_that_are_gone_to_calls_that_are_there(rtx: Any) -> None:
    text = (Path(__file__).parents[3] / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    table = text.partition("## Calls of old tutorials")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    gone, there = (
        {name for row in rows for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", row[column])} for column in (0, 1)
    )
    assert {name for name in gone if exists(rtx, name)} == set()
    assert {name for name in there if not exists(rtx, name)} == set()
