"""The training loop: transformers' Trainer, with the loss as the model's output and whole checkpoints only."""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tasks.calibration.progress import Report
from tasks.distillation.losses import IGNORE, distillation_loss, next_tokens

CHECKPOINT = "checkpoint-"
PARTIAL = "partial"
WEIGHTS = "student.safetensors"
BEST = "best.safetensors"


class StudentLoss(nn.Module):
    """The student as the Trainer sees it: token ids in, loss out. The teacher is no part of it."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, ce_weight: float, temperature: float):
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # a tuple hides it: it is neither trained, nor saved, nor moved, nor replicated
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.parts = torch.zeros(2)  # cross-entropy and forward KL since they were last read

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        """Mean loss over the valid tokens of the whole batch, of which these sequences may be a part.

        Args:
            input_ids: [batch, sequence] int64.
            labels: [batch, sequence] int64; -100 is not predicted.
            num_items_in_batch: valid tokens of all micro-batches that make one step; None: of this one.
        """
        (teacher,) = self._teacher
        hidden = last_hidden(self.student, input_ids)
        teacher_hidden = teacher_head = None
        if teacher is not None and self.ce_weight < 1:
            with torch.no_grad():
                teacher_hidden = last_hidden(teacher, input_ids)
            teacher_head = head_weight(teacher).detach()
        targets = next_tokens(labels).flatten()
        mixture = distillation_loss(
            hidden.flatten(0, 1),
            head_weight(self.student),
            None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_head,
            targets,
            ce_weight=self.ce_weight,
            temperature=self.temperature,
        )
        num_tokens = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        self.parts += torch.stack([mixture.cross_entropy, mixture.forward_kl]).cpu() / float(num_tokens)
        return {"loss": mixture.loss / num_tokens}


def last_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[batch, sequence, hidden], what the LM head reads."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def head_weight(model: PreTrainedModel) -> Tensor:
    """[vocab_size, hidden], the LM head."""
    return model.get_output_embeddings().weight  # type: ignore[no-any-return]


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check that the model's logits are its LM head times its last hidden state, which the chunked loss relies on.

    Raises:
        ValueError: the family does more (a bias, a scale, a cap).
    """
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    actual = last_hidden(model, ids) @ head_weight(model).T
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"Distillation needs logits that are the LM head times the last hidden state; {model.config.model_type} "
            f"differs by {float((actual - expected).abs().max()):.3g} (a bias, scale or cap). Use another model."
        )


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor, precision: str, batch_size: int = 4) -> float:
    """exp(total NLL / predicted tokens) of non-overlapping sequences; infinite where that overflows.

    Args:
        model: a causal language model; put into evaluation mode.
        tokens: [num_sequences, sequence_length] integer.
        precision: "float32" or "bfloat16", of the matrix products.
        batch_size: sequences in one forward pass.
    """
    model.eval()
    total, count = 0.0, 0
    for batch in torch.split(tokens.long(), batch_size):
        ids = batch.to(model.device)
        targets = next_tokens(ids).flatten()
        with autocast(model.device, precision):
            hidden = last_hidden(model, ids).flatten(0, 1)
            sums = distillation_loss(hidden, head_weight(model), None, None, targets, ce_weight=1.0, temperature=1.0)
        total += float(sums.cross_entropy)
        count += int((targets != IGNORE).sum())
    return math.exp(total / count) if total / count < 700 else math.inf


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in `precision`."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def round_linears_(model: PreTrainedModel) -> None:
    """Store the linear layers of a frozen model in bfloat16.

    Autocast would round them so in every forward pass: the results are the same bits, without the work and with half
    the memory. A tied LM head stays float32, because the embedding is read as it is.
    """
    tied = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not tied:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def keep_zeros_(model: PreTrainedModel) -> int:
    """Make every weight of a linear layer that is exactly zero stay so in training; returns how many there are.

    Their gradients are set to zero as soon as they are there, so AdamW's moments stay zero and neither its step nor
    its weight decay moves them. A tied LM head is left free: the embedding of a padding token starts as zeros.
    """
    tied, count = model.get_input_embeddings().weight, 0
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.weight is tied:
            continue
        zeros = module.weight.detach() == 0
        num_zeros = int(zeros.sum())
        if num_zeros:
            count += num_zeros
            module.weight.register_post_accumulate_grad_hook(zero_gradient_at(zeros))  # type: ignore[no-untyped-call]
    return count


def zero_gradient_at(zeros: Tensor) -> Callable[[Tensor], None]:
    """A hook for after a parameter's gradient is accumulated: where `zeros` is true, the parameter then stays."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(zeros.to(parameter.grad.device), 0)

    return hook


class TrainingOrder(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The sequences of a whole run in the order they are trained on: one permutation per pass, from seed and pass.

    Item i is a function of (seed, i) alone, so a run that goes on reads exactly what it would have read.
    """

    def __init__(self, tokens: np.ndarray[Any, np.dtype[np.int32]], num_items: int, seed: int):
        self.tokens, self.num_items, self.seed = tokens, num_items, seed
        self._pass = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, position = divmod(index, len(self.tokens))
        if self._pass[0] != number:
            self._pass = (number, np.random.default_rng([self.seed, number]).permutation(len(self.tokens)))
        ids = torch.from_numpy(self.tokens[self._pass[1][position]].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Budget:
    """When training ends, and the learning rate on the way there, as a fraction of its peak."""

    max_steps: int
    max_s: float | None
    warmup_ratio: float
    schedule: str  # "cosine", "linear" or "constant"

    def learning_rate(self, step: int, elapsed_s: float) -> float:
        """The factor for the step after `step` steps; with a limit in seconds it falls with whichever ends first."""
        done, one_step = step / self.max_steps, 1 / self.max_steps
        if self.max_s is not None:
            done = max(done, min(1.0, elapsed_s / self.max_s))
        if done < self.warmup_ratio:
            return (done + one_step) / (self.warmup_ratio + one_step)
        if self.schedule == "constant":
            return 1.0
        left = (1 - done) / (1 - self.warmup_ratio)
        return left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


class _Flow(TrainerCallback):  # type: ignore[misc]
    """Takes the time of each step, ends training with its budget, and leaves out the checkpoint nobody would read."""

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.step_started_at = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        trainer.step_s = time.monotonic() - trainer.step_started_at
        if trainer.budget.max_s is not None and trainer.elapsed_s() >= trainer.budget.max_s:
            control.should_training_stop = control.should_evaluate = True
        if control.should_training_stop:
            control.should_save = False


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trainer with our schedule and figures, for a `StudentLoss`."""

    control: Any

    def __init__(
        self,
        loss: StudentLoss,
        args: TrainingArguments,
        *,
        order: TrainingOrder,
        heldout: Tensor,
        budget: Budget,
        precision: str,
        keep_best: bool,
        report: Report,
    ):
        super().__init__(model=loss, args=args, train_dataset=order, eval_dataset=heldout)
        self.loss, self.order, self.heldout, self.budget = loss, order, heldout, budget
        self.precision, self.keep_best, self.report = precision, keep_best, report
        self.model_accepts_loss_kwargs = True  # so the Trainer counts valid tokens over accumulated micro-batches,
        self._loss_shifts_labels = True  # the first of each sequence being no target
        self.step_started_at = self.started_at = time.monotonic()
        self.step_s = self.elapsed_before_s = 0.0
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self))

    @property
    def work_dir(self) -> Path:
        """Where complete checkpoints lie."""
        return Path(self.args.output_dir)

    @property
    def best_weights(self) -> Path:
        """Those of the lowest held-out perplexity, with `keep_best`."""
        return self.work_dir / BEST

    def elapsed_s(self) -> float:
        """Seconds spent in training so far, those before an interruption included."""
        return self.elapsed_before_s + time.monotonic() - self.started_at

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """Train to the end of the budget, from `resume_from_checkpoint` on."""
        shutil.rmtree(self.work_dir / PARTIAL, ignore_errors=True)
        if resume_from_checkpoint is not None:
            history = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json")).log_history
            self.elapsed_before_s = max((entry.get("elapsed_s", 0.0) for entry in history), default=0.0)
        self.started_at = time.monotonic()
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The budget's learning rate."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: self.budget.learning_rate(step, self.elapsed_s())
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our figures, report them, and stop at the first loss that is no number.

        Raises:
            ValueError: loss or gradients are NaN or infinite.
        """
        step = self.state.global_step
        if "loss" in logs:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)):
                    raise ValueError(
                        f"Training needs finite numbers; the {name.replace('_', ' ')} is {logs[name]} at step {step} "
                        f"(learning rate {logs['learning_rate']:.3g}, {self.precision}). Lower learning_rate, lengthen "
                        "the warm-up, or check the weights of teacher and student."
                    )
            tokens = self.tokens_per_step
            ce, kl = (float(part) * self.args.world_size for part in self.loss.parts)  # of this device's tokens
            self.loss.parts.zero_()
            logs = {"loss": logs["loss"], "cross_entropy": ce, "forward_kl": kl, "learning_rate": logs["learning_rate"]}
            logs |= {"tokens": tokens * step, "tokens_per_s": tokens / self.step_s, "step_s": self.step_s}
        elif "perplexity" not in logs:
            return  # the Trainer's own summary
        if self.is_world_process_zero():
            shown = {name: value for name, value in logs.items() if name != "step_s"}
            self.report(step, self.budget.max_steps, shown)
        super().log({**logs, "elapsed_s": self.elapsed_s()}, start_time)

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by one step, on all devices together."""
        return int(self.get_total_train_batch_size(self.args) * self.order.tokens.shape[1])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The student's perplexity on the held-out sequences."""
        value = perplexity(self.loss.student, self.heldout, self.precision)
        best = min((entry["perplexity"] for entry in self.state.log_history if "perplexity" in entry), default=math.inf)
        if self.keep_best and value < best and self.args.should_save:
            partial = self.best_weights.with_suffix(".partial")
            safetensors.torch.save_model(self.loss.student, str(partial))
            partial.replace(self.best_weights)
        metrics = {"perplexity": value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.work_dir / PARTIAL)  # the Trainer writes here; only whole checkpoints are moved up

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide the system's own error
            shutil.rmtree(self.work_dir / PARTIAL, ignore_errors=True)
            if shutil.disk_usage(self.work_dir).free < checkpoint_bytes(self.loss.student):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.work_dir)) from error
            raise
        self.accelerator.wait_for_everyone()  # each process adds its random state
        if self.args.should_save:
            name = f"{CHECKPOINT}{self.state.global_step}"
            (self.work_dir / PARTIAL / name).replace(self.work_dir / name)
            for older in self.work_dir.glob(f"{CHECKPOINT}*"):
                if older.name != name:
                    shutil.rmtree(older)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(self.loss.student, os.fspath(Path(output_dir) / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        safetensors.torch.load_model(self.loss.student, os.fspath(Path(resume_from_checkpoint) / WEIGHTS))


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of one checkpoint: weights and both moments."""
    return sum(3 * parameter.numel() * parameter.element_size() for parameter in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Size of the weights alone, those that are not trained included."""
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


def last_checkpoint(work_dir: Path) -> Path | None:
    """The newest whole checkpoint in `work_dir`."""
    found = [path for path in work_dir.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return max(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)), default=None)
