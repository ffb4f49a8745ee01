"""Stage: a quantized checkpoint in, one on the same grids out, trained on the distributions of the float model.

Training is that of distillation (tasks/distillation), with the quantized layers fake-quantized (fake.py): what is
exported computes what was trained.
"""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tasks.calibration.architectures import architecture
from tasks.calibration.checkpoints import copy_tokenizer, load_model
from tasks.calibration.progress import Report, silent
from tasks.calibration.tensor_files import TensorWriter
from tasks.calibration.tokens import check_vocabulary
from tasks.distillation.training import Loss, TrainingSummary, train
from tasks.quantization.checkpoint_format import (
    QuantizedWeight,
    linear_tensors,
    read_weights,
    table_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantizationTraining(Loss, frozen=True, extra="forbid"):
    """Training of a quantized model on the answers of the float model it was made from; its grids stay as they are."""

    train: Literal["scales", "all"] = Field(
        "scales",
        description="scales: of the quantized layers only scales and real offsets, their integers stay; the norms and "
        "whatever else is float (EfficientQAT, arXiv:2407.11062, section 3.3). all: the integers too, as weights that "
        "are rounded in every step (LSQ, arXiv:1902.08153).",
    )
    ce_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="a in `a * CE + (1 - a) * T^2 * KL`; 0 asks for the float model's answers and nothing else.",
    )


class QuantizationTrainingSummary(TrainingSummary, frozen=True):
    """What training did; `num_parameters` are the model's."""

    num_trained: int  # numbers that were trained: scales, norms, and latent weights with `all`
    num_integers: int
    num_integers_changed: int
    size_bytes: int  # the safetensors files


def train_quantized(
    *,
    checkpoint: Path,
    teacher: Path,
    data: Path,
    options: QuantizationTraining,
    seed: int,
    work_dir: Path,
    out: Path,
    report: Report = silent,
) -> QuantizationTrainingSummary:
    """The quantized model `checkpoint`, trained on the next-token distributions of the float model `teacher`.

    Bits, group sizes and zero points stay. So do weights that are exactly zero in the teacher and in the checkpoint:
    pruned ones, where the grid has a zero. With `all`, weights begin at the teacher's where these round to the same
    integers, else (GPTQ and AWQ have moved them) at the de-quantized ones: from there half a step changes an integer.

    Args:
        checkpoint: compressed-tensors, as `quantize_checkpoint` writes it.
        teacher: plain checkpoint, what `checkpoint` was quantized from.
        data: prepared tokens, of the tokenizer of both.
        options: what to train and how.
        seed: decides the order of the data.
        work_dir: keeps checkpoints to go on from, as for `distill`.
        out: receives a compressed-tensors checkpoint with the configuration of `checkpoint`.
        report: told every step.

    Raises:
        ValueError: `checkpoint` is float or `teacher` is quantized; and what `distill` raises it for.
    """
    from tasks.distillation.trainer import zero_gradient_at
    from tasks.quantization.fake import QuantizedLinear, make_trainable_

    _check_kinds(checkpoint, teacher)
    check_vocabulary(data, teacher)
    check_vocabulary(data, checkpoint)
    weights = read_weights(checkpoint)
    quantized = {
        name.removesuffix(".weight"): weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)
    }
    for name, each in quantized.items():
        if each.inputs or each.format != "int8":
            raise ValueError(
                f"Training is of integer weights with float inputs; {name} is FP8 or has rounded inputs. "
                "Quantize without `activations` and `format`."
            )
    student = load_model(checkpoint)
    trained = make_trainable_(student, quantized, latent=options.train == "all")
    float_model = load_model(teacher)
    num_zeros_kept = 0
    for name, weight in trained.items():
        if weight.latent is None:
            continue
        original = float_model.get_submodule(name).weight.detach()
        if original.shape != weight.latent.shape:
            raise ValueError(
                f"The teacher must be the model that was quantized; its {name} is {list(original.shape)}, that of "
                f"{checkpoint} {list(weight.latent.shape)}. Use the float model, or `train: scales`."
            )
        weight.begin_at_(original)
        zeros = (weight.rows().detach() == 0) & (original == 0)
        if isinstance(student.get_submodule(name), QuantizedLinear) and zeros.any():
            num_zeros_kept += int(zeros.sum())
            hook: Any = weight.latent.register_post_accumulate_grad_hook  # it has no types
            hook(zero_gradient_at(zeros))
    num_trained = student.num_parameters()

    def save(student: "PreTrainedModel") -> None:
        floats = student.state_dict()
        with TensorWriter(out) as writer:
            for name in weights:
                module = name.removesuffix(".weight")
                if module in trained:
                    writer.add(_tensors(student, module, trained[module].stored()))
                else:
                    writer.add({name: floats[name].numpy()})
        for name in ("config.json", "generation_config.json"):
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, out / name)
        copy_tokenizer(checkpoint, out)

    summary = train(
        student=student,
        teacher=float_model,
        inputs=[checkpoint, teacher],
        save=save,
        data=data,
        options=options,
        seed=seed,
        work_dir=work_dir,
        out=out,
        report=report,
        num_zeros_kept=num_zeros_kept,
    )
    changed = [np.count_nonzero(trained[n].stored().integers != quantized[n].integers) for n in quantized]
    figures = summary.model_dump() | {
        "num_parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "num_trained": num_trained,
        "num_integers": sum(math.prod(weight.shape) for weight in quantized.values()),
        "num_integers_changed": sum(changed),
        "size_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }
    return QuantizationTrainingSummary.model_validate(figures)


def _tensors(student: "PreTrainedModel", module: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What the file holds for a quantized layer, and for the LM head that is tied to it."""
    family = architecture(student.config.model_type)
    if module not in (family.embedding, family.lm_head):
        return linear_tensors(module, weight)
    return table_tensors(module, weight, family.lm_head if student.config.tie_word_embeddings else None)


def _check_kinds(checkpoint: Path, teacher: Path) -> None:
    """Raise ValueError unless `checkpoint` is quantized and `teacher` is float."""
    quantized = {
        path: "quantization_config" in json.loads((path / "config.json").read_text()) for path in (checkpoint, teacher)
    }
    if not quantized[checkpoint]:
        raise ValueError(
            f"Training of a quantized model needs one; {checkpoint} is float. Quantize it first, or use `recovery`."
        )
    if quantized[teacher]:
        raise ValueError(
            f"The teacher of a quantized model must be float; {teacher} is quantized. Use the model it was made from."
        )
