import numpy as np
import pytest
import torch

from tasks.calibration.checkpoints import load_model
from tasks.quantization import Grid
from tasks.quantization.rtn import round_to_nearest
from tasks.quantization.sensitivity import EVERY, SensitivitySummary, measure_sensitivity, read_scores

CHOICES = (Grid(bits=2, group_size=16), Grid(bits=4, group_size=16), Grid())
TOKENS = np.random.default_rng(0).integers(0, 512, (4, 32)).astype(np.int32)


@pytest.fixture
def data(tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    np.save(out / "calibration.npy", TOKENS)
    return out


def measured(checkpoint, data, tmp_path, **options):
    arguments = {"choices": CHOICES, "embedding_choices": (), "ignore": ()} | options
    summary = measure_sensitivity(checkpoint=checkpoint, data=data, out=tmp_path, **arguments)
    return summary, read_scores(tmp_path)


def divergence(checkpoint, layers, grid):
    """The definition: the whole model run twice."""
    model = load_model(checkpoint)
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        before = model(input_ids=ids).logits[:, EVERY - 1 :: EVERY].log_softmax(-1)
        for layer in layers:
            weight = model.get_submodule(layer).weight
            weight.copy_(torch.from_numpy(round_to_nearest(weight.clone(), grid, layer).dequantize()))
        after = model(input_ids=ids).logits[:, EVERY - 1 :: EVERY].log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_every_part_is_measured_as_if_the_whole_model_were_run(tiny_checkpoint, data, tmp_path):
    summary, scores = measured(tiny_checkpoint, data, tmp_path, embedding_choices=CHOICES[1:])
    assert summary.num_parts == 4 * 4 + 1
    assert len(scores) == 16 * 3 + 2
    for score in scores[::7]:
        assert score.kl == pytest.approx(divergence(tiny_checkpoint, score.layers, score.grid), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "opt", "gpt_neox"])
def test_parts_of_other_families_are_measured_so_too(family_checkpoint, data, tmp_path, family):
    checkpoint = family_checkpoint(family)
    summary, scores = measured(checkpoint, data, tmp_path, embedding_choices=CHOICES[1:])
    assert summary.num_parts == 3 * 4 + 1
    for score in [scores[0], *scores[2::9]]:
        assert score.kl == pytest.approx(divergence(checkpoint, score.layers, score.grid), rel=1e-3, abs=1e-6)


def test_fewer_bits_diverge_more(tiny_checkpoint, data, tmp_path):
    summary, scores = measured(tiny_checkpoint, data, tmp_path)
    totals = [sum(score.kl for score in scores if score.grid == grid) for grid in CHOICES]
    assert totals == sorted(totals, reverse=True)
    assert summary.total_kl_coarsest == pytest.approx(totals[0])
    assert summary.total_kl_finest == pytest.approx(totals[-1])


def test_ignored_layers_are_no_part(tiny_checkpoint, data, tmp_path):
    ignore = ("model.layers.0.*", "*.k_proj", "model.embed_tokens")
    summary, scores = measured(tiny_checkpoint, data, tmp_path, ignore=ignore, embedding_choices=(Grid(),))
    assert summary.num_parts == 3 * 4
    assert not any(layer.endswith("k_proj") for score in scores for layer in score.layers)


def test_nothing_left_is_refused(tiny_checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match=r"`ignore` \(model\.layers\.\*\) leaves none"):
        measured(tiny_checkpoint, data, tmp_path, ignore=("model.layers.*",))


STAGE = """
import os, signal
from pathlib import Path
import tasks.quantization.sensitivity as sensitivity
from tasks.quantization import Grid

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(*, moment: str, checkpoint: Path, data: Path, choices: tuple[Grid, ...], embedding_choices: tuple[Grid, ...],
          ignore: tuple[str, ...], out: Path, work_dir: Path, report=None) -> None:
    if moment == "in a block":
        count, real = iter(range(1000)), sensitivity.round_to_nearest
        sensitivity.round_to_nearest = lambda *a: die() if next(count) == 2 + 7 * 3 * 2 + 5 else real(*a)
    if moment == "while scores are written":
        real = sensitivity.move_whole
        sensitivity.move_whole = lambda a, b: die() if b.name == "block-1.json" else real(a, b)
    options = {"choices": choices, "embedding_choices": embedding_choices, "ignore": ignore}
    sensitivity.measure_sensitivity(checkpoint=checkpoint, data=data, out=out, work_dir=work_dir, **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "finished"), [("in a block", 2), ("while scores are written", 1)])
def test_a_killed_stage_goes_on_after_its_last_block_and_ends_with_the_same_scores(
    tiny_checkpoint, data, tmp_path, killing, moment, finished
):
    options = {"choices": CHOICES, "embedding_choices": CHOICES[1:], "ignore": ()}
    arguments = {"checkpoint": tiny_checkpoint, "data": data, **options}
    stage = killing(STAGE, "tasks.quantization.sensitivity:measure_sensitivity", SensitivitySummary, arguments)
    whole = stage.run("whole", "calm")
    assert whole.resumed_from_block is None
    stage.killed("killed", moment)
    assert len(list((tmp_path / "killed").glob("block-*.json"))) == finished

    blocks = []
    resumed = stage.run("resumed", "killed", lambda step, total, _: blocks.append(step))
    assert blocks == list(range(finished + 1, 5))
    assert resumed == whole.model_copy(update={"resumed_from_block": finished})
    assert (tmp_path / "resumed" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()


def test_what_was_measured_is_not_measured_again(tiny_checkpoint, data, tmp_path, monkeypatch):
    _, first = measured(tiny_checkpoint, data, tmp_path, work_dir=tmp_path / "work", embedding_choices=CHOICES[1:])
    monkeypatch.setattr("tasks.quantization.sensitivity.round_to_nearest", None)
    summary, second = measured(
        tiny_checkpoint, data, tmp_path, work_dir=tmp_path / "work", embedding_choices=CHOICES[1:]
    )
    assert first == second
    assert summary.resumed_from_block == 4


def test_a_work_directory_of_other_arguments_is_refused(tiny_checkpoint, data, tmp_path):
    measured(tiny_checkpoint, data, tmp_path, work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="holds the work of one with other choices, ignore"):
        measured(tiny_checkpoint, data, tmp_path, work_dir=tmp_path / "work", choices=CHOICES[1:], ignore=("*.q_proj",))
