"""Train a student on a teacher's next-token distributions: a new smaller one, or a pruned model that is to recover.

The loss is Hinton's mixture `a * CE + (1 - a) * T^2 * KL(teacher || student)` (losses.py). With `ce_weight` 1 the
teacher is not consulted at all: that run, with as many tokens, is the control that shows what distillation gave.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, Field

from tasks.calibration.checkpoints import load_model, save_model
from tasks.calibration.progress import Report, silent
from tasks.calibration.tokens import check_vocabulary, load_tokens
from tasks.calibration.work_directory import claim, digests
from tasks.distillation.students import KeepLayers, block_influence, evenly_spaced, keep_layers, most_influential

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

NUM_HELDOUT = 8
"""Calibration sequences that training never sees, for the student's perplexity on the way."""
NUM_INFLUENCE = 16
"""Calibration sequences over which block influence is averaged."""
MAX_POINTS = 40


class Training(BaseModel, frozen=True, extra="forbid"):
    """How long and how a model is trained. AdamW, moments 0.9 and 0.95."""

    max_steps: int = Field(100, ge=1, description="Optimizer steps.")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="Wall-clock limit; the learning rate then falls with whichever budget ends first. With a limit "
        "the result depends on the machine's speed: it is not bit-identical from run to run.",
    )
    batch_size: int = Field(2, ge=1, description="Sequences in one forward and backward pass, per device.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Such passes in one optimizer step.")
    learning_rate: float = Field(4e-4, gt=0, lt=1, description="Its peak.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Fraction of the budget in which it rises to the peak.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How it falls to 0 afterwards.")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="Of matrices; norms and biases have none.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are shortened to this L2 norm.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of matrix products; weights and moments are always float32. auto: bfloat16 on a GPU that has it "
        "and on a CPU with AMX, float32 elsewhere, where it is faster.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more time.")
    save_every_steps: int = Field(25, ge=1, description="Checkpoints to go on from after an interruption.")
    evaluate_every_steps: int = Field(25, ge=1, description="Perplexity on held-out calibration text.")
    keep: Literal["last", "best"] = Field("last", description="Which weights to return; best: lowest such perplexity.")


class Loss(BaseModel, frozen=True, extra="forbid"):
    """What every training from a teacher can be told."""

    ce_weight: float = Field(
        0.5, ge=0, le=1, description="a in `a * CE + (1 - a) * T^2 * KL`; 1 is training without a teacher, the control."
    )
    temperature: float = Field(1.0, gt=0, le=100, description="T; 1 compares the distributions as they are.")
    training: Training = Training()

    def shared_by(self, processes: int) -> Self:
        """What each of so many processes does, so that together they take the same steps.

        Raises:
            ValueError: a step has not as many passes, nor sequences in each, as can be shared evenly.
        """
        for name in ("gradient_accumulation_steps", "batch_size"):
            share, rest = divmod(getattr(self.training, name), processes)
            if not rest:
                return self.model_copy(update={"training": self.training.model_copy(update={name: share})})
        raise ValueError(
            f"{processes} processes share the passes of a step, or the sequences of a pass; got "
            f"gradient_accumulation_steps {self.training.gradient_accumulation_steps} and batch_size "
            f"{self.training.batch_size}. Make one of them a multiple of {processes}."
        )


class Distillation(Loss, frozen=True, extra="forbid"):
    """A smaller student of the source model (Hinton et al., 2015, arXiv:1503.02531)."""

    method: Literal["logits"] = "logits"
    student: KeepLayers


class Recovery(Loss, frozen=True, extra="forbid"):
    """Training of a pruned model on the answers of the model it was pruned from."""

    method: Literal["logits"] = "logits"
    keep_zeros: bool = Field(True, description="Weights that pruning set to zero stay zero.")


class CurvePoint(BaseModel, frozen=True):
    """One point of the training curve: the mean since the point before."""

    step: int
    num_tokens: int
    loss: float
    cross_entropy: float
    forward_kl: float
    learning_rate: float
    perplexity: float | None


class TrainingSummary(BaseModel, frozen=True):
    """What training did. Perplexities are of held-out calibration text, in sequences of the training length."""

    num_parameters: int
    teacher_num_parameters: int
    kept_layers: tuple[int, ...] | None
    num_zeros_kept: int
    num_steps: int
    num_tokens: int
    stopped_by: Literal["steps", "minutes"]
    resumed_from_step: int | None
    precision: Literal["float32", "bfloat16"]
    loss_first: float
    loss_last: float
    perplexity_before: float
    perplexity_after: float
    teacher_perplexity: float
    tokens_per_s: float
    elapsed_s: float
    curve: tuple[CurvePoint, ...]


def distill(
    *,
    teacher: Path,
    data: Path,
    options: Distillation,
    seed: int,
    work_dir: Path,
    out: Path,
    report: Report = silent,
) -> TrainingSummary:
    """A student made of some of the teacher's layers and trained on its next-token distributions.

    Args:
        teacher: plain checkpoint.
        data: prepared tokens, of the teacher's tokenizer.
        options: what to keep and how to train.
        seed: decides the order of the data.
        work_dir: keeps checkpoints; a second call with the same arguments goes on from the last one and, on a CPU
            with as many threads and without `max_minutes`, ends with the same bits as an uninterrupted run.
        out: receives the student as a plain checkpoint.
        report: is told loss, cross_entropy, forward_kl, tokens_per_s and learning_rate of every step.

    Raises:
        ValueError: the tokenizers differ, there is too little data, `work_dir` belongs to other arguments, or
            training diverges.
    """
    import torch

    check_vocabulary(data, teacher)
    model = load_model(teacher)
    num_layers, num_kept = model.config.num_hidden_layers, options.student.layers
    if options.student.choice == "evenly" or num_kept > num_layers:
        kept = evenly_spaced(num_layers, num_kept)
    else:
        sequences = torch.from_numpy(load_tokens(data, "calibration")[:NUM_INFLUENCE])
        kept = most_influential(block_influence(model, sequences), num_kept)
    return train(
        student=keep_layers(model, kept),
        teacher=model,
        kept_layers=kept,
        inputs=[teacher],
        save=lambda student: save_model(student, teacher, out),
        data=data,
        options=options,
        seed=seed,
        work_dir=work_dir,
        out=out,
        report=report,
    )


def recover(
    *,
    checkpoint: Path,
    teacher: Path,
    data: Path,
    options: Recovery,
    seed: int,
    work_dir: Path,
    out: Path,
    report: Report = silent,
) -> TrainingSummary:
    """The pruned model `checkpoint`, trained on the next-token distributions of the unpruned `teacher`.

    Arguments and errors are those of `distill`; zeros stay zeros with `keep_zeros`.
    """
    from tasks.distillation.trainer import keep_zeros_

    check_vocabulary(data, teacher)
    check_vocabulary(data, checkpoint)
    student = load_model(checkpoint)
    return train(
        student=student,
        teacher=load_model(teacher),
        num_zeros_kept=keep_zeros_(student) if options.keep_zeros else 0,
        inputs=[checkpoint, teacher],
        save=lambda student: save_model(student, checkpoint, out),
        data=data,
        options=options,
        seed=seed,
        work_dir=work_dir,
        out=out,
        report=report,
    )


def choose_precision(wanted: Literal["auto", "float32", "bfloat16"]) -> Literal["float32", "bfloat16"]:
    """The precision of matrix products; "auto" is bfloat16 where it is faster, on GPUs that have it and with AMX."""
    import torch

    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def train(
    *,
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    inputs: Sequence[Path],
    save: Callable[["PreTrainedModel"], None],
    data: Path,
    options: Loss,
    seed: int,
    work_dir: Path,
    out: Path,
    report: Report,
    kept_layers: tuple[int, ...] | None = None,
    num_zeros_kept: int = 0,
) -> TrainingSummary:
    """Train every parameter of `student`, in place, on the teacher's distributions, and save it.

    Arguments and errors are those of `distill`, but for:

    Args:
        student: what is trained; its state is all that a checkpoint in `work_dir` holds of it.
        teacher: is frozen, and rounded to bfloat16 in that precision.
        inputs: checkpoints that both were made from.
        save: is given the trained student, on the CPU, to write it to `out`.
        kept_layers: for the summary, as is `num_zeros_kept`.
        num_zeros_kept: weights that training cannot move.
    """
    import safetensors.torch
    import torch

    from tasks.distillation import trainer as loop

    training = options.training
    precision = choose_precision(training.precision)
    tokens = load_tokens(data, "training")
    heldout = torch.from_numpy(load_tokens(data, "calibration")[:NUM_HELDOUT])
    for role, sequences in (("training", tokens), ("calibration", heldout)):
        if len(sequences) == 0 or sequences.shape[1] < 2:
            raise ValueError(
                f"Training needs at least one {role} sequence of 2 tokens; got {tuple(sequences.shape)}. "
                "Use a longer corpus or shorter sequences."
            )
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"Teacher and student need the same vocabulary; got {teacher.config.vocab_size} and "
            f"{student.config.vocab_size} words. Use the model that the student was made from as its teacher."
        )
    if int(tokens.max()) >= student.config.vocab_size:
        raise ValueError(
            f"Tokens must be below the model's vocabulary of {student.config.vocab_size}; got {int(tokens.max())}. "
            "Prepare the data with this model's tokenizer."
        )
    for model in (student, teacher):
        loop.check_head(model)
    _check_disk({work_dir: 2 * loop.checkpoint_bytes(student), out: loop.model_bytes(student)})
    content = {"inputs": [digests(path) for path in inputs], "data": digests(data), "seed": seed}
    claim(work_dir, {**content, "options": options.model_dump(mode="json"), "precision": precision})

    teacher.requires_grad_(False)
    student.requires_grad_(True)
    if training.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = loop.StudentLoss(student, teacher, options.ce_weight, options.temperature)
    arguments = _arguments(training, seed, work_dir, precision)
    num_sequences = training.max_steps * training.gradient_accumulation_steps * arguments.train_batch_size
    run = loop.DistillationTrainer(
        loss,
        arguments,
        order=loop.TrainingOrder(tokens, num_sequences * arguments.world_size, seed),
        heldout=heldout,
        budget=loop.Budget(
            max_steps=training.max_steps,
            max_s=None if training.max_minutes is None else 60 * training.max_minutes,
            warmup_ratio=training.warmup_ratio,
            schedule=training.schedule,
        ),
        precision=precision,
        keep_best=training.keep == "best",
        report=report,
    )
    teacher.to(arguments.device)
    teacher_perplexity = loop.perplexity(teacher, heldout, precision)
    perplexity_before = loop.perplexity(student, heldout, precision)
    if precision == "bfloat16":
        loop.round_linears_(teacher)
    num_parameters, teacher_num_parameters = (m.num_parameters() for m in (student, teacher))
    last = loop.last_checkpoint(work_dir)
    run.train(resume_from_checkpoint=None if last is None else str(last))

    history = run.state.log_history
    steps = [entry for entry in history if "loss" in entry]
    perplexities = {entry["step"]: entry["perplexity"] for entry in history if "perplexity" in entry}
    perplexity_after = perplexities[max(perplexities)]
    if training.keep == "best" and math.isfinite(min(perplexities.values())):
        perplexity_after = min(perplexities.values())
        safetensors.torch.load_model(student, str(run.best_weights))
    student.to("cpu").eval()
    if run.is_world_process_zero():
        save(student)
    _end_together()
    return TrainingSummary(
        num_parameters=num_parameters,
        teacher_num_parameters=teacher_num_parameters,
        kept_layers=kept_layers,
        num_zeros_kept=num_zeros_kept,
        num_steps=steps[-1]["step"],
        num_tokens=int(steps[-1]["tokens"]),
        stopped_by="steps" if steps[-1]["step"] == training.max_steps else "minutes",
        resumed_from_step=None if last is None else int(last.name.removeprefix(loop.CHECKPOINT)),
        precision=precision,
        loss_first=steps[0]["loss"],
        loss_last=steps[-1]["loss"],
        perplexity_before=perplexity_before,
        perplexity_after=perplexity_after,
        teacher_perplexity=teacher_perplexity,
        tokens_per_s=steps[-1]["tokens"] / sum(entry["step_s"] for entry in steps),
        elapsed_s=history[-1]["elapsed_s"],
        curve=_curve(steps, perplexities),
    )


def _end_together() -> None:
    """Let the processes of torchrun part: not before the model is saved, and without threads that would abort them."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _arguments(training: Training, seed: int, work_dir: Path, precision: str) -> "TrainingArguments":
    import torch
    from transformers import TrainingArguments

    use_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work_dir),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=precision == "bfloat16",
        use_cpu=use_cpu,
        seed=seed,
        train_sampling_strategy="sequential",  # the data set is in training order already
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number is an error here
        eval_strategy="steps",
        eval_steps=training.evaluate_every_steps,
        save_strategy="steps",
        save_steps=training.save_every_steps,
        report_to="none",
        disable_tqdm=True,
    )


def _check_disk(needs: dict[Path, int]) -> None:
    """Raise ValueError unless there is room for the student and two checkpoints: bytes by directory.

    Two, because the next is whole before the last goes; what an interrupted run left there counts as room.
    """
    for directory, in_all in needs.items():
        needed = in_all
        for path in directory.rglob("*"):
            with suppress(FileNotFoundError):  # another process of this run has just renamed it
                needed -= path.stat().st_size if path.is_file() else 0
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise ValueError(
                f"Training needs {needed / 2**20:.0f} MiB of disk in {directory}; {free / 2**20:.0f} MiB are free. "
                "Free some, or move the store to a larger disk."
            )


def _curve(steps: list[dict[str, float]], perplexities: dict[int, float]) -> tuple[CurvePoint, ...]:
    """At most MAX_POINTS equally spaced steps, and every step with a perplexity."""
    spacing = math.ceil(len(steps) / MAX_POINTS)
    points, group = [], []
    for number, entry in enumerate(steps, start=1):
        group.append(entry)
        step = int(entry["step"])
        if number % spacing and number < len(steps) and step not in perplexities:
            continue
        mean = {name: sum(e[name] for e in group) / len(group) for name in ("loss", "cross_entropy", "forward_kl")}
        points.append(
            CurvePoint(
                step=step,
                num_tokens=int(entry["tokens"]),
                learning_rate=entry["learning_rate"],
                perplexity=perplexities.get(step),
                **mean,
            )
        )
        group = []
    return tuple(points)
