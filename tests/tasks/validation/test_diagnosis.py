import numpy as np
import pytest

from tasks.engines.operators import OperatorGroup, Operators
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.validation.diagnosis import Facts, LayerError, Speeds, compare_layers, explain, num_weights
from tasks.validation.machine import Machine

GB = 10**9
MACHINE = Machine(
    threads=2,
    read_bytes_per_s={10**6: 10 * GB, 10**9: 10 * GB},
    operations_per_s={"float32": 100 * GB, "bfloat16": 100 * GB, "int8": 200 * GB},
)
VNNI = ("avx2", "avx512f", "avx512_vnni")


def group(kind: str, role: str, num: int, elapsed_ms: float) -> OperatorGroup:
    return OperatorGroup(kind=kind, role=role, num=num, elapsed_ms=elapsed_ms)


INTEGERS = (group("MatMulNBits", "integer product", 20, 8.0), group("Reshape", "other", 30, 2.0))


def facts(groups=INTEGERS, **changes) -> Facts:
    given = {
        "engine": "onnxruntime",
        "rounds_inputs": True,
        "operators": Operators(groups=groups),
        "weight_bytes": 100 * 10**6,
        "num_weights": 100 * 10**6,
        "instructions": VNNI,
        "processor": "a processor",
    }
    return Facts(**given | changes)


def speeds(tpot_ms: float, ttft_ms: float = 1e6) -> Speeds:
    return Speeds(tpot_ms=tpot_ms, ttft_ms=ttft_ms, prompt_tokens=128, machine=MACHINE)


def kinds(found: Facts, measured: Speeds | None = None, *, slower: bool = True, worse: bool = False) -> list[str]:
    return [finding.kind for finding in explain(found, measured, slower=slower, worse=worse).findings]


def test_reading_100_mb_at_10_gb_per_s_bounds_a_token_of_12_ms() -> None:
    (finding,) = explain(facts(), speeds(12.0), slower=True, worse=False).findings
    assert finding.kind == "memory-bound"
    assert "reading 100 MB" in finding.sentence
    assert "takes 10 of the 12 ms" in finding.sentence


def test_a_small_part_of_the_time_cannot_be_gained_twice() -> None:
    found = explain(facts(), speeds(100.0), slower=True, worse=False).findings
    assert [finding.kind for finding in found] == ["too small", "operators"]
    assert "saves at most 10%" in found[0].sentence
    assert "50 operators per token, 2e+03 µs each" in found[1].sentence
    assert "20 MatMulNBits 80%" in found[1].sentence


def test_128_tokens_of_200_million_operations_bound_a_prompt_of_150_ms() -> None:
    assert "compute-bound" in kinds(facts(), speeds(12.0, ttft_ms=150.0))
    assert "compute-bound" not in kinds(facts(), speeds(12.0, ttft_ms=1500.0))


def test_fake_quantized_weights_are_named_before_anything_else() -> None:
    groups = (group("FusedMatMul", "float product", 17, 6.0), group("DequantizeLinear", "weights to floats", 17, 4.0))
    found = explain(facts(groups), speeds(12.0), slower=True, worse=False).findings
    assert found[0].kind == "restored weights"
    assert "17 operators (DequantizeLinear) take 40% of its time" in found[0].sentence


def test_floats_that_were_asked_for_are_no_riddle() -> None:
    groups = (group("MatMulNBits", "float product", 20, 8.0),)
    found = explain(facts(groups, rounds_inputs=False), None, slower=True, worse=False).findings
    assert [finding.kind for finding in found] == ["float products"]
    assert "`activations: float32` asks for it" in found[0].sentence


@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_a_float_model_is_not_blamed_for_being_one(rounds_inputs) -> None:
    groups = (group("FusedMatMul", "float product", 17, 6.0),)
    assert kinds(facts(groups, rounds_inputs=rounds_inputs, instructions=("avx2",))) == []


def test_layers_that_are_stored_as_floats_are_not_counted_among_integers() -> None:
    groups = (group("MatMulNBits", "float product", 20, 8.0), group("FusedMatMul", "float product", 1, 1.0))
    found = explain(facts(groups, rounds_inputs=False), None, slower=True, worse=False).findings
    assert "20 of 20 matrix products of weights that are stored as integers run in floats (MatMulNBits)" in (
        found[0].sentence
    )


@pytest.mark.parametrize(("instructions", "named"), [(("avx2",), True), (VNNI, False), (("avx2", "avx_vnni"), False)])
def test_integers_without_their_instructions_are_named(instructions, named) -> None:
    assert ("missing instructions" in kinds(facts(instructions=instructions))) == named


def test_openvino_multiplies_stored_integers_in_floats_without_vnni() -> None:
    groups = (group("FullyConnectedCompressed (brgemm_avx2_f32)", "float product", 29, 9.0),)
    found = explain(facts(groups, engine="openvino", instructions=("avx2",)), None, slower=True, worse=False).findings
    assert [finding.kind for finding in found] == ["float products", "missing instructions"]
    assert "29 of 29 matrix products of weights that are stored as integers run in floats" in found[0].sentence


def layer(index: int, attention: float, feed_forward: float) -> LayerError:
    return LayerError(
        name=f"model.layers.{index}",
        whole=max(attention, feed_forward),
        attention=attention,
        feed_forward=feed_forward,
        accumulated=0.2,
    )


def test_a_block_that_stands_out_is_named_with_its_half() -> None:
    layers = (layer(0, 0.01, 0.02), layer(1, 0.3, 0.02), layer(2, 0.02, 0.01))
    (finding,) = explain(facts(layers=layers), None, slower=False, worse=True).findings
    assert "model.layers.1 30.0% (attention)" in finding.sentence
    assert "model.layers.0" not in finding.sentence


def test_an_even_error_blames_no_block() -> None:
    layers = (layer(0, 0.01, 0.02), layer(1, 0.02, 0.021))
    (finding,) = explain(facts(layers=layers), None, slower=False, worse=True).findings
    assert "spread evenly: 2.0% to 2.1%" in finding.sentence


def test_fewer_blocks_are_the_reason_where_they_cannot_be_compared() -> None:
    shorter = facts(num_layers=22, original_num_layers=30, why_no_layers="it has 22 blocks and the original 30")
    assert kinds(shorter, slower=False, worse=True) == ["structure"]


def test_the_block_with_coarser_weights_has_the_largest_error(tiny_checkpoint, tmp_path) -> None:
    for name in ("out", "data"):
        (tmp_path / name).mkdir()
    windows = np.random.default_rng(0).integers(0, 512, (2, 32))
    np.save(tmp_path / "data" / "calibration.npy", windows.astype(np.int32))
    fine = ("model.layers.0.*", "model.layers.1.*", "model.layers.3.*", "model.layers.2.self_attn.*")
    method = RoundToNearest(weights=Grid(bits=4, group_size=32), embeddings=None, ignore=fine)
    quantize_checkpoint(checkpoint=tiny_checkpoint, data=tmp_path / "data", method=method, out=tmp_path / "out")
    why, layers = compare_layers(tmp_path / "out", tiny_checkpoint, windows)
    assert why == ""
    assert [layer.whole > 0.01 for layer in layers] == [False, False, True, False]
    assert [layer.whole for layer in layers if layer.name != "model.layers.2"] == [0, 0, 0]
    assert layers[2].attention == 0
    assert layers[2].feed_forward == layers[2].whole
    assert layers[1].accumulated == 0
    assert layers[3].accumulated > 0


def test_weights_per_token_are_counted_from_the_configuration(tiny_checkpoint) -> None:
    attention, feed_forward = 64 * 16 * (2 * 4 + 2 * 2), 3 * 64 * 128
    assert num_weights(tiny_checkpoint) == 4 * (attention + feed_forward) + 64 * 512
