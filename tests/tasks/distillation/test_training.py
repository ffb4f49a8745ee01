import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tasks.calibration.checkpoints import load_model, save_model
from tasks.distillation import Distillation, KeepLayers, Recovery, Training
from tasks.distillation.training import choose_precision, distill, recover

BRIEF = Training(
    max_steps=10,
    batch_size=2,
    learning_rate=2e-3,
    precision="float32",
    save_every_steps=4,
    evaluate_every_steps=5,
)
"""Ten steps of 64 tokens."""


def options(training=BRIEF, **changes):
    return Distillation(student=KeepLayers(layers=2, choice="evenly"), training=training, **changes)


def changed(**changes):
    return BRIEF.model_copy(update=changes)


@pytest.fixture
def run(tiny_checkpoint, tiny_data, tmp_path):
    """Distil into a fresh directory (or go on in `work_dir`); returns the summary and the student's directory."""

    def run(wanted=None, name="student", **arguments):
        out = tmp_path / f"{name}.out"
        out.mkdir()
        arguments = {"work_dir": tmp_path / name, "teacher": tiny_checkpoint, "data": tiny_data, "seed": 0} | arguments
        return distill(options=wanted or options(), out=out, **arguments), out

    return run


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_a_student_learns_its_teacher(run):
    summary, out = run(options(changed(max_steps=40, evaluate_every_steps=10)))
    assert summary.kept_layers == (0, 3)
    assert summary.perplexity_after < 0.8 * summary.perplexity_before
    assert summary.loss_last < summary.loss_first
    assert (summary.num_steps, summary.num_tokens) == (40, 40 * 2 * 32)
    assert [point.step for point in summary.curve if point.perplexity] == [10, 20, 30, 40]
    assert summary.curve[-1].perplexity == summary.perplexity_after
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.config.num_hidden_layers == 2
    assert student.num_parameters() == summary.num_parameters < summary.teacher_num_parameters


def test_only_a_plain_checkpoint_is_left(run, tiny_checkpoint):
    _, out = run()
    assert {path.name for path in out.iterdir()} == {path.name for path in tiny_checkpoint.iterdir()}
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_each_step_is_reported(run):
    steps = []
    run(report=lambda *step: steps.append(step))
    losses = [(step, total) for step, total, figures in steps if "loss" in figures]
    assert losses == [(i, 10) for i in range(1, 11)]
    assert {"loss", "cross_entropy", "forward_kl", "tokens_per_s", "learning_rate"} <= steps[0][2].keys()
    assert [step for step, _, figures in steps if "perplexity" in figures] == [5, 10]
    for _, _, figures in steps:
        if "loss" in figures:
            mixture = 0.5 * figures["cross_entropy"] + 0.5 * figures["forward_kl"]
            assert figures["loss"] == pytest.approx(mixture, rel=1e-5)


def test_the_learning_rate_rises_then_falls_to_nothing(run):
    rates = []
    run(
        options(changed(warmup_ratio=0.3)),
        report=lambda _step, _total, figures: rates.append(figures.get("learning_rate")),
    )
    rates = [rate for rate in rates if rate]
    assert rates.index(max(rates)) == 3
    assert max(rates) == pytest.approx(2e-3)
    assert rates[0] == pytest.approx(2e-3 / 4)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.1 * 2e-3


def test_accumulated_micro_batches_are_one_batch(run):
    training = changed(max_steps=3)
    _, whole = run(options(training), "whole")
    _, parts = run(options(training.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 2})), "parts")
    first, second = load_model(whole).state_dict(), load_model(parts).state_dict()
    for name, weight in first.items():  # sums in another order; Adam divides by tiny moments
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-5)


def test_the_seed_decides_the_result(run):
    (_, one), (_, two), (_, other) = run(name="one"), run(name="two"), run(name="other", seed=1)
    assert digest(one) == digest(two)
    assert digest(one)["model.safetensors"] != digest(other)["model.safetensors"]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from tasks.distillation.training import Distillation, distill

arguments = json.loads(sys.argv[1])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if arguments.pop("moment") == "in a step":
    report = lambda step, total, figures: die() if step == 7 else None
else:  # the weights of step 8 are written, its optimizer is not
    import torch
    save = torch.save
    torch.save = lambda value, path, **k: die() if Path(path).parent.name == "checkpoint-8" else save(value, path, **k)
    report = lambda *_: None
options = Distillation.model_validate(arguments.pop("options"))
distill(**{k: Path(v) for k, v in arguments.items()}, options=options, seed=0, report=report)
"""


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint, tiny_data, tmp_path_factory):
    """Digests of the student of a run that nothing disturbed."""
    work_dir, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("whole")
    distill(options=options(), teacher=tiny_checkpoint, data=tiny_data, seed=0, work_dir=work_dir, out=out)
    return digest(out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a step", "while a checkpoint is written"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    run, uninterrupted, tiny_checkpoint, tiny_data, tmp_path, moment
):
    work_dir, lost = tmp_path / "killed", tmp_path / "lost"
    lost.mkdir()
    arguments = {"teacher": tiny_checkpoint, "data": tiny_data, "work_dir": work_dir, "out": lost}
    text = json.dumps({**arguments, "moment": moment, "options": options().model_dump()}, default=str)
    root = Path(__file__).parents[3]
    died = subprocess.run([sys.executable, "-c", KILLED, text], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in work_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (work_dir / "partial" / "checkpoint-8").exists() == (moment != "in a step")
    assert not list(lost.iterdir())

    steps = []
    summary, resumed = run(name="killed", report=lambda step, _total, _figures: steps.append(step))
    assert summary.resumed_from_step == 4
    assert min(steps) == 5
    assert digest(resumed) == uninterrupted
    assert [point.step for point in summary.curve] == list(range(1, 11))


TOGETHER = """
import json, sys
from pathlib import Path
from tasks.distillation.training import Distillation, distill

arguments = json.loads(sys.argv[1])
options = Distillation.model_validate(arguments.pop("options"))
distill(**{k: Path(v) for k, v in arguments.items()}, options=options, seed=0)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(run, tiny_checkpoint, tiny_data, tmp_path):
    training = changed(max_steps=5, batch_size=4)
    _, alone = run(options(training), "alone")
    script, out = tmp_path / "together.py", tmp_path / "together"
    script.write_text(TOGETHER)
    out.mkdir()
    arguments = {"teacher": tiny_checkpoint, "data": tiny_data, "work_dir": tmp_path / "work", "out": out}
    each = options(training.model_copy(update={"batch_size": 2})).model_dump()
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(
        [*command, json.dumps({**arguments, "options": each}, default=str)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=300,
    )
    expected = load_model(alone).state_dict()
    for name, weight in load_model(out).state_dict().items():  # sums in another order; Adam divides by tiny moments
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    assert {path.name for path in (tmp_path / "work").glob("checkpoint-4/rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_a_work_directory_serves_one_run(run, tmp_path):
    run(name="mine")
    shutil.rmtree(tmp_path / "mine.out")
    with pytest.raises(ValueError, match="other seed"):
        run(name="mine", seed=1)


def test_only_the_newest_checkpoint_is_kept(run, tmp_path):
    run(name="mine")
    assert [path.name for path in (tmp_path / "mine").glob("checkpoint-*")] == ["checkpoint-8"]


def test_no_teacher_is_asked_without_distillation(run, monkeypatch):
    from tasks.distillation import trainer

    asked = []
    original = trainer.last_hidden
    monkeypatch.setattr(trainer, "last_hidden", lambda model, ids: asked.append(model.training) or original(model, ids))
    summary, _ = run(options(ce_weight=1.0))
    assert sum(asked) == 10  # the student, once a step
    assert all(point.forward_kl == 0 for point in summary.curve)


def test_other_tokenizers_are_refused(run, tiny_data, tmp_path):
    other = tmp_path / "other-data"
    shutil.copytree(tiny_data, other)
    record = json.loads((other / "data.json").read_text())
    (other / "data.json").write_text(json.dumps({**record, "tokenizer_sha256": "0" * 64, "vocab_size": 777}))
    with pytest.raises(ValueError, match="777 tokens"):
        run(data=other)


def test_tokens_outside_the_vocabulary_are_refused(run, tiny_data, tmp_path):
    other = tmp_path / "other-data"
    shutil.copytree(tiny_data, other)
    np.save(other / "training.npy", np.full((4, 32), 600, np.int32))
    with pytest.raises(ValueError, match="vocabulary of 512; got 600"):
        run(data=other)


def test_no_sequences_are_refused(run, tiny_data, tmp_path):
    other = tmp_path / "other-data"
    shutil.copytree(tiny_data, other)
    np.save(other / "training.npy", np.zeros((0, 32), np.int32))
    with pytest.raises(ValueError, match=r"one training sequence of 2 tokens; got \(0, 32\)"):
        run(data=other)


def test_a_loss_that_is_no_number_ends_training(run, tiny_checkpoint, tmp_path):
    broken = load_model(tiny_checkpoint)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    save_model(broken, tiny_checkpoint, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"loss is nan at step 1 .*learning_rate"):
        run(teacher=tmp_path / "broken")
    assert not list((tmp_path / "student").glob("checkpoint-*"))


def test_time_runs_out(run):
    summary, out = run(options(changed(max_steps=100_000, max_minutes=1 / 60, save_every_steps=1000)))
    assert summary.stopped_by == "minutes"
    assert 1 <= summary.num_steps < 100_000
    assert summary.elapsed_s < 30
    assert summary.curve[-1].perplexity == summary.perplexity_after
    assert summary.curve[-1].learning_rate < 0.7 * 2e-3  # it fell with the time, not with the steps
    assert len(summary.curve) <= 2 * 40 + summary.num_steps // 5
    AutoModelForCausalLM.from_pretrained(out)


def test_the_best_weights_can_be_kept(run, tiny_data, monkeypatch):
    from tasks.calibration.tokens import load_tokens
    from tasks.distillation import trainer

    measure, calls = trainer.perplexity, []

    def worse_after_step_6(*arguments):  # the teacher's and the untrained student's come first
        calls.append(measure(*arguments))
        return calls[-1] + (1000 if len(calls) > 2 + 6 else 0)

    monkeypatch.setattr(trainer, "perplexity", worse_after_step_6)
    summary, out = run(options(changed(evaluate_every_steps=1, keep="best")))
    seen = [point.perplexity for point in summary.curve]
    assert summary.perplexity_after == min(seen) < seen[-1]
    heldout = torch.from_numpy(load_tokens(tiny_data, "calibration")[:8])
    assert measure(load_model(out), heldout, "float32") == pytest.approx(min(seen), rel=1e-6)


def test_perplexity_is_that_of_all_tokens_together(tiny_checkpoint):
    from tasks.distillation.trainer import perplexity

    model = load_model(tiny_checkpoint)
    tokens = torch.randint(0, 512, (5, 9))
    with torch.no_grad():
        log_p = model(tokens).logits.log_softmax(-1)
    total = sum(-log_p[b, s, tokens[b, s + 1]].item() for b in range(5) for s in range(8))
    assert perplexity(model, tokens, "float32", batch_size=2) == pytest.approx(np.exp(total / 40), rel=1e-4)


def test_block_influence_chooses_the_layers(run):
    wanted = Distillation(student=KeepLayers(layers=3, choice="block_influence"), training=BRIEF)
    summary, out = run(wanted)
    assert len(summary.kept_layers) == 3
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


def test_bfloat16_trains_float32_weights(run):
    summary, out = run(options(changed(precision="bfloat16")))
    assert summary.precision == "bfloat16"
    assert summary.perplexity_after < summary.perplexity_before
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out, dtype="auto").parameters()} == {torch.float32}


def test_rounding_a_frozen_teacher_changes_no_bit(tiny_checkpoint):
    from tasks.distillation.trainer import last_hidden, round_linears_

    model = load_model(tiny_checkpoint)
    tokens = torch.randint(0, 512, (2, 16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = last_hidden(model, tokens)
        round_linears_(model)
        assert torch.equal(last_hidden(model, tokens), expected)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_recovery_keeps_the_zeros(tiny_checkpoint, tiny_data, tmp_path):
    pruned = load_model(tiny_checkpoint)
    with torch.no_grad():
        for block in pruned.model.layers:
            weight = block.mlp.up_proj.weight
            weight.masked_fill_(weight.abs() < weight.abs().median(), 0)
    save_model(pruned, tiny_checkpoint, tmp_path / "pruned")
    zeros = {name: value == 0 for name, value in pruned.state_dict().items() if name.endswith("up_proj.weight")}
    results = {}
    for keep_zeros in (True, False):
        out = tmp_path / f"out-{keep_zeros}"
        out.mkdir()
        summary = recover(
            checkpoint=tmp_path / "pruned",
            teacher=tiny_checkpoint,
            data=tiny_data,
            options=Recovery(keep_zeros=keep_zeros, training=changed(weight_decay=0.1)),
            seed=0,
            work_dir=tmp_path / f"work-{keep_zeros}",
            out=out,
        )
        assert summary.perplexity_after < summary.perplexity_before
        assert summary.kept_layers is None
        results[keep_zeros] = load_model(out).state_dict()
        assert summary.num_zeros_kept == (sum(int(mask.sum()) for mask in zeros.values()) if keep_zeros else 0)
    for name, mask in zeros.items():
        assert (results[True][name][mask] == 0).all()
        assert (results[True][name][~mask] != pruned.state_dict()[name][~mask]).any()
        assert (results[False][name][mask] != 0).any()


def test_a_student_of_another_vocabulary_is_refused(tiny_checkpoint, tiny_data, tmp_path):
    larger = load_model(tiny_checkpoint)
    larger.resize_token_embeddings(520)
    save_model(larger, tiny_checkpoint, tmp_path / "larger")
    with pytest.raises(ValueError, match="got 512 and 520 words"):
        recover(
            checkpoint=tmp_path / "larger",
            teacher=tiny_checkpoint,
            data=tiny_data,
            options=Recovery(training=BRIEF),
            seed=0,
            work_dir=tmp_path / "work",
            out=tmp_path,
        )


def test_a_disk_that_is_too_small_is_refused_before_training(run, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(ValueError, match=r"needs 2 MiB of disk .*; 1 MiB are free"):
        run()
    assert not list((tmp_path / "student").iterdir())


def test_a_disk_that_fills_up_is_named(run, monkeypatch, tmp_path):
    save = torch.save

    def full(value, path, **_):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**30, 2**30, 0))
        save({}, path)
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        run()
    assert caught.value.filename == str(tmp_path / "student")
    assert not (tmp_path / "student" / "partial").exists()


def test_precision_is_as_named(monkeypatch):
    assert choose_precision("float32") == "float32"
    assert choose_precision("bfloat16") == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_precision("auto") == "bfloat16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto") == "float32"


def test_misspelt_options_are_refused():
    with pytest.raises(ValidationError, match=r"training\.learning_rat\n.*Extra inputs"):
        Distillation.model_validate({"student": {"layers": 2}, "training": {"learning_rat": 1e-4}})
    with pytest.raises(ValidationError, match="ce_weight"):
        Recovery(ce_weight=1.5)


def test_options_are_read_without_heavy_libraries():
    code = (
        "import sys, tasks.distillation, tasks.distillation.training; print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout == "set()\n", done.stderr
