"""What a plan says of itself, and who may load it: plain values, no library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.engines.decoder import read_decoder
from tasks.engines.tensorrt_plan import (
    DECODE,
    PREFILL,
    Bounds,
    Gpu,
    PlanRecord,
    cannot_execute,
    cannot_read,
    number,
    profiles,
    read_record,
    write_record,
)

A10 = Gpu(name="NVIDIA A10", compute_capability="8.6")
RTX_3090 = Gpu(name="NVIDIA GeForce RTX 3090", compute_capability="8.6")
L4 = Gpu(name="NVIDIA L4", compute_capability="8.9")
T4 = Gpu(name="Tesla T4", compute_capability="7.5")
RTX_5090 = Gpu(name="NVIDIA GeForce RTX 5090", compute_capability="12.0")


def record(library: str, **changes: Any) -> PlanRecord:
    return PlanRecord.model_validate(
        {
            "library": library,
            "version": "1.7.1.116" if library == "tensorrt_rtx" else "10.12.0.36",
            "built_on": A10 if library == "tensorrt" else None,
            "compute_capabilities": (),
            "hardware_compatibility": None,
            "version_compatible": False,
            "refit": False,
            "strip_weights": False,
            "float8": False,
            "products": {},
        }
        | changes
    )


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record("tensorrt", products={"Int8 × Int8": 8}, hardware_compatibility="ampere_plus")
    write_record(tmp_path, written)
    assert read_record(tmp_path) == written


def test_plan_without_its_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no plan\.json\. Compile it again"):
        read_record(tmp_path)
    (tmp_path / "plan.json").write_text('{"library": "tensorrt"}')
    with pytest.raises(
        ValueError, match=r"plan\.json is not the record of a TensorRT plan: version: Field required\. Compile"
    ):
        read_record(tmp_path)


def test_plan_of_tensorrt_for_rtx_is_read_by_its_own_version_only() -> None:
    told = record("tensorrt_rtx")
    assert cannot_read(told, library="tensorrt_rtx", version="1.7.1.116") is None
    problem = cannot_read(told, library="tensorrt_rtx", version="1.8.0.4")
    assert problem == (
        "A plan is read by the very version that built it, TensorRT for RTX 1.7.1.116; this is 1.8.0.4. "
        "Install 1.7.1.116, or compile it again."
    )


@pytest.mark.parametrize(
    ("built", "here", "compatible", "reads"),
    [
        ("10.12.0.36", "10.12.0.36", False, True),
        ("10.12.0.36", "10.13.0.35", False, False),
        ("10.12.0.36", "10.13.0.35", True, True),
        ("10.12.0.36", "11.4.0.106", True, True),  # NVIDIA's support matrix: 10 by 11, no other step across majors
        ("10.13.0.35", "10.12.0.36", True, False),
        ("11.4.0.106", "10.16.1.11", True, False),
        ("10.12.0.36", "12.0.0.1", True, False),
    ],
)
def test_version_compatible_plan_is_read_by_later_versions(
    built: str, here: str, compatible: bool, reads: bool
) -> None:
    told = record("tensorrt", version=built, version_compatible=compatible)
    problem = cannot_read(told, library="tensorrt", version=here)
    assert (problem is None) == reads
    if problem:
        assert built in problem
        assert f"this is {here}" in problem


def test_plan_of_the_other_library_is_refused() -> None:
    problem = cannot_read(record("tensorrt"), library="tensorrt_rtx", version="1.7.1.116")
    assert problem == (
        "The plan was built by TensorRT; the engine's options say library 'tensorrt_rtx'. Compile it again."
    )


@pytest.mark.parametrize(
    ("changes", "gpu", "message"),
    [
        ({}, A10, None),
        ({}, RTX_5090, None),
        ({}, T4, r"runs on 8\.0 and later; this is Tesla T4 \(7\.5\)"),
        ({"float8": True}, L4, None),
        ({"float8": True}, A10, r"runs on 8\.9 and later; this is NVIDIA A10 \(8\.6\)"),
        ({"compute_capabilities": ("8.6", "8.9")}, L4, None),
        (
            {"compute_capabilities": ("8.6", "8.9")},
            RTX_5090,
            r"8\.6, 8\.9, for which it was built; this is .*\(12\.0\)",
        ),
        ({"refit": True, "built_on": A10}, RTX_3090, None),
        ({"refit": True, "built_on": A10}, L4, r"it was built on, NVIDIA A10 \(8\.6\); this is NVIDIA L4 \(8\.9\)"),
    ],
)
def test_plan_of_tensorrt_for_rtx_runs_on_what_it_was_built_for(
    changes: dict[str, Any], gpu: Gpu, message: str | None
) -> None:
    check(cannot_execute(record("tensorrt_rtx", **changes), gpu), message)


@pytest.mark.parametrize(
    ("compatibility", "gpu", "message"),
    [
        (None, A10, None),
        (None, RTX_3090, r"it was built on, NVIDIA A10 \(8\.6\); this is NVIDIA GeForce RTX 3090 \(8\.6\)"),
        ("same_compute_capability", RTX_3090, None),
        ("same_compute_capability", L4, r"this is NVIDIA L4 \(8\.9\)"),
        ("ampere_plus", L4, None),
        ("ampere_plus", T4, r"8\.0 and later; this is Tesla T4 \(7\.5\)"),
    ],
)
def test_enterprise_plan_runs_where_its_compatibility_says(
    compatibility: str | None, gpu: Gpu, message: str | None
) -> None:
    check(cannot_execute(record("tensorrt", hardware_compatibility=compatibility), gpu), message)


def check(problem: str | None, message: str | None) -> None:
    if message is None:
        assert problem is None
    else:
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem)


def test_version_numbers_compare_as_numbers() -> None:
    assert number("10.12.0.36") > number("10.9.0.34")
    assert number("12.0") > number("8.9")
    assert number("11") == (11, 0)


def test_profiles_cover_every_prompt_and_every_step(tiny_checkpoint: Path) -> None:
    found = profiles(read_decoder(tiny_checkpoint), max_batch_size=4, max_prompt=64, max_length=96)
    smallest, typical, largest = found[PREFILL]["input_ids"]
    assert (smallest, typical, largest) == ((1, 1), (1, 64), (4, 64))
    assert found[PREFILL]["past_key_values.3.value"][2] == (4, 2, 0, 16)
    assert found[PREFILL]["logit_indices"] == ((1,), (1,), (64,))
    assert found[DECODE]["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert found[DECODE]["past_key_values.0.key"] == ((1, 2, 1, 16), (1, 2, 95, 16), (4, 2, 95, 16))
    assert found[DECODE]["attention_mask"][2] == (4, 96)
    assert len(found[DECODE]) == 4 + 2 * 4


def test_profiles_end_where_the_model_does(tiny_checkpoint: Path) -> None:
    found = profiles(read_decoder(tiny_checkpoint), max_batch_size=1, max_prompt=1024, max_length=2048)
    assert found[PREFILL]["input_ids"][2] == (1, 512)
    assert found[DECODE]["attention_mask"][2] == (1, 512)


@pytest.mark.parametrize(
    ("batch_size", "length", "num_logits", "message"),
    [
        (4, 64, 64, None),
        (5, 64, 1, "at most 4 sequences at once; got 5"),
        (4, 65, 1, "prompts of at most 64 tokens; got 65"),
        (1, 97, 1, "at most 96 tokens; got 97"),
        (1, 8, 9, "between 1 and the prompt's 8 tokens; got 9"),
    ],
)
def test_prompt_outside_the_profiles_is_refused_with_its_number(
    batch_size: int, length: int, num_logits: int, message: str | None
) -> None:
    bounds = Bounds(batch_size=4, prompt=64, length=96, vocab_size=512)
    prompt = np.zeros((batch_size, length), dtype=np.int64)
    if message is None:
        bounds.check_prefill(prompt, num_logits)
    else:
        with pytest.raises(ValueError, match=message):
            bounds.check_prefill(prompt, num_logits)
