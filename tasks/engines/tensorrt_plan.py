"""A TensorRT plan without the library: its profiles, and what it was built with and for.

The record lies beside the plan. A plan for another version or another GPU is refused from it, in words, before the
library's runtime is touched. https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-compatibility.html
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from tasks.engines.decoder import Decoder
from tasks.engines.generation import Ids, check_prompt

PLAN_FILE = "model.plan"
RECORD_FILE = "plan.json"
GRAPH_FILE = "model.onnx"  # in the bundle of a plan without weights only

Library = Literal["tensorrt_rtx", "tensorrt"]
ComputeCapability = Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]  # what TensorRT for RTX builds for
HardwareCompatibility = Literal["same_compute_capability", "ampere_plus"]
NAMES = {"tensorrt_rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}

PREFILL, DECODE = 0, 1  # the plan's optimization profiles
TYPICAL_PROMPT = 128  # what kernels are chosen for, within the profiles' bounds
Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Smallest, typical and largest shape of every input."""


class Gpu(BaseModel, frozen=True, extra="forbid"):
    """A GPU as the CUDA driver names it."""

    name: str
    compute_capability: str = Field(description='"major.minor".')

    @property
    def generation(self) -> tuple[int, int]:
        """(major, minor), which compare in order."""
        return number(self.compute_capability)


class PlanRecord(BaseModel, frozen=True, extra="forbid"):
    """What a plan was built with, and what may run it."""

    format: Literal[1] = 1
    library: Library
    version: str = Field(description="Of the library that built it.")
    built_on: Gpu | None = Field(description="None: TensorRT for RTX built it without looking at a GPU.")
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        description="Which GPUs it was built for, by TensorRT for RTX; empty: all that the library takes by default."
    )
    hardware_compatibility: HardwareCompatibility | None
    version_compatible: bool
    refit: bool
    strip_weights: bool
    float8: bool = Field(description="Whether it multiplies FP8 numbers, which GPUs before 8.9 cannot.")
    products: dict[str, int] = Field(
        description="Kernels that multiply matrices, by types, as the builder's log tells them; of both profiles."
    )


def read_record(bundle: Path) -> PlanRecord:
    """What the plan in `bundle` was built with.

    Raises:
        ValueError: there is no record, or it is not one of ours.
    """
    file = bundle / RECORD_FILE
    try:
        return PlanRecord.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"A plan needs its record, which says what can run it; {bundle} holds no {RECORD_FILE}. Compile it again."
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{file} is not the record of a TensorRT plan: {where or 'JSON'}: {first['msg']}. Compile it again."
        ) from None


def write_record(bundle: Path, record: PlanRecord) -> None:
    """Writes `record` beside the plan."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True)
    (bundle / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def number(version: str) -> tuple[int, int]:
    """(major, minor) of "11.4.0.106" or "8.9"."""
    major, minor = re.findall(r"\d+", version + ".0")[:2]
    return int(major), int(minor)


def cannot_read(record: PlanRecord, *, library: Library, version: str) -> str | None:
    """Why this version of the library cannot read a plan with that record; None if it can."""
    name = NAMES[record.library]
    if record.library != library:
        return f"The plan was built by {name}; the engine's options say library {library!r}. Compile it again."
    if record.version == version:
        return None
    if library == "tensorrt_rtx" or not record.version_compatible:
        hint = "" if library == "tensorrt_rtx" else ", with `version_compatible: true` where it must outlive an upgrade"
        return (
            f"A plan is read by the very version that built it, {name} {record.version}; this is {version}. "
            f"Install {record.version}, or compile it again{hint}."
        )
    (built, _), (here, _) = number(record.version), number(version)
    if _parts(version) < _parts(record.version) or here not in (built, built + 1):
        return (
            f"A version-compatible plan is read by the version that built it, {name} {record.version}, and later ones "
            f"up to the next major; this is {version}. Install one of those, or compile it again."
        )
    return None


def cannot_execute(record: PlanRecord, gpu: Gpu) -> str | None:
    """Why `gpu` cannot run a plan with that record; None if it can."""
    here = f"this is {gpu.name} ({gpu.compute_capability})"
    if record.library == "tensorrt_rtx":
        if record.compute_capabilities:
            if gpu.compute_capability in record.compute_capabilities:
                return None
            return (
                f"The plan runs on compute capability {', '.join(record.compute_capabilities)}, for which it was "
                f"built; {here}. Compile it with {gpu.compute_capability!r} in `compute_capabilities`."
            )
        if record.refit or record.strip_weights:  # built with the GPU's help, for that kind
            return _same_capability(record, gpu, here)
        lowest = "8.9" if record.float8 else "8.0"
        if gpu.generation < number(lowest):
            return (
                f"A plan that was built without `compute_capabilities` runs on {lowest} and later; {here}. Compile it "
                "with that in `compute_capabilities`."
            )
        return None
    if record.hardware_compatibility == "ampere_plus":
        if gpu.generation < (8, 0):
            return f"A plan for `ampere_plus` runs on compute capability 8.0 and later; {here}. Compile it there."
        return None
    if record.hardware_compatibility == "same_compute_capability":
        return _same_capability(record, gpu, here)
    if gpu != record.built_on:
        return (
            f"A plan runs on the kind of GPU it was built on, {_told(record.built_on)}; {here}. Compile it there, or "
            "with `hardware_compatibility`."
        )
    return None


def _same_capability(record: PlanRecord, gpu: Gpu, here: str) -> str | None:
    if record.built_on and record.built_on.compute_capability == gpu.compute_capability:
        return None
    return (
        f"The plan runs on the compute capability it was built on, {_told(record.built_on)}; {here}. Compile it there."
    )


def _told(gpu: Gpu | None) -> str:
    return f"{gpu.name} ({gpu.compute_capability})" if gpu else "an unknown one"


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def profiles(decoder: Decoder, *, max_batch_size: int, max_prompt: int, max_length: int) -> tuple[Profile, Profile]:
    """Shapes of every input for prefill (no past) and for decode (one token), by the index of the phase."""
    max_length = min(max_length, decoder.max_position_embeddings)
    max_prompt = min(max_prompt, max_length)
    typical = min(TYPICAL_PROMPT, max_prompt)
    batches = (1, 1, max_batch_size)
    prefill = ((1, 0, 1), (typical, 0, 1), (max_prompt, 0, max_prompt))  # (length, past, num_logits)
    decode = ((1, 1, 1), (1, min(2 * typical, max_length - 1), 1), (1, max_length - 1, 1))

    def profile(bounds: tuple[tuple[int, int, int], ...]) -> Profile:
        smallest, typical, largest = (
            _input_shapes(decoder, batch, *bound) for batch, bound in zip(batches, bounds, strict=True)
        )
        return {name: (smallest[name], typical[name], largest[name]) for name in smallest}

    return profile(prefill), profile(decode)


def _input_shapes(decoder: Decoder, batch: int, length: int, past: int, num_logits: int) -> dict[str, Shape]:
    cache = (batch, decoder.num_kv_heads, past, decoder.head_dim)
    return {
        "input_ids": (batch, length),
        "attention_mask": (batch, past + length),
        "position_ids": (batch, length),
        "logit_indices": (num_logits,),
        **{
            f"past_key_values.{index}.{half}": cache
            for index in range(len(decoder.layers))
            for half in ("key", "value")
        },
    }


@dataclass(frozen=True)
class Bounds:
    """The largest batch, prompt and sequence that a plan's profiles hold."""

    batch_size: int
    prompt: int
    length: int
    vocab_size: int

    def check_prefill(self, input_ids: Ids, num_logits: int) -> None:
        """Refuses a prompt that the prefill profile does not hold.

        Raises:
            ValueError: the message names the value and its maximum.
        """
        check_prompt(input_ids, num_logits, vocab_size=self.vocab_size, max_length=self.length)
        batch_size, length = input_ids.shape
        if batch_size > self.batch_size:
            raise ValueError(
                f"This plan reads at most {self.batch_size} sequences at once; got {batch_size}. Use smaller batches, "
                "or compile it with a larger max_batch_size."
            )
        if length > self.prompt:
            raise ValueError(
                f"This plan reads prompts of at most {self.prompt} tokens; got {length}. Shorten it, or compile it "
                "with a larger max_prompt."
            )
