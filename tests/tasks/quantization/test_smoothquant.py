import pytest
import torch

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.layerwise import observe_inputs
from tasks.calibration.statistics import InputPeak
from tasks.quantization.smoothquant import scales, smooth_, smoothed

LLAMA = architecture("llama")
BATCHES = torch.split(torch.arange(512).view(8, 64), 4)
LINEARS = LLAMA.all_linears(4)


def test_scales_are_the_papers():
    peak = torch.tensor([4.0, 9.0, 0.0, 1.0])
    weights = [torch.tensor([[1.0, -0.25, 3.0, 0.0]]), torch.tensor([[0.5, 1.0, 1.0, 0.0], [-2.0, 0.1, 1.0, 0.0]])]
    assert scales(peak, weights, 0.5).tolist() == pytest.approx([2**0.5, 3.0, 1.0, 1.0])
    expected = [float(peak[j]) ** 0.8 / max(float(w[:, j].abs().max()) for w in weights) ** 0.2 for j in range(2)]
    torch.testing.assert_close(scales(peak, weights, 0.8)[:2], torch.tensor(expected))


@torch.no_grad()
def test_the_model_computes_the_same_and_its_inputs_are_smooth(tiny_checkpoint):
    model, original = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    with torch.no_grad():
        for each in (model, original):
            each.model.layers[1].input_layernorm.weight[7] *= 50  # an outlier
    smooth_(model, LLAMA, BATCHES, LINEARS, 0.5)
    for batch in BATCHES:
        torch.testing.assert_close(model(batch).logits, original(batch).logits, rtol=1e-4, atol=1e-4)
    q = "model.layers.1.self_attn.q_proj"
    before, after = (observe_inputs(m, BATCHES, [q], InputPeak)[q].value for m in (original, model))
    assert before.max() / before.median() > 20
    assert after.max() / after.median() < 10


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.no_grad()
def test_every_family_computes_the_same_with_other_weights(family_checkpoint, family):
    model, original = load_model(family_checkpoint(family)), load_model(family_checkpoint(family))
    row = architecture(family)
    smooth_(model, row, BATCHES, row.all_linears(3), 0.5)
    torch.testing.assert_close(model(BATCHES[0]).logits, original(BATCHES[0]).logits, rtol=1e-4, atol=1e-4)
    changed = {row.steps[0][0], row.steps[2][0]} | ({row.mlp_output} if row.gated else set())
    for linear in row.linears:
        name = f"{row.block(1)}.{linear}"
        same = torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
        assert same != (linear in changed or linear in row.steps[0] + row.steps[2]), linear


@torch.no_grad()
def test_with_alpha_a_half_inputs_and_weights_are_equally_large(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    smooth_(model, LLAMA, BATCHES, LINEARS, 0.5)
    for step in (LLAMA.steps[0], LLAMA.steps[3]):  # of gate and up, the latter changes once more, for down
        names = [f"model.layers.2.{name}" for name in step]
        peak = observe_inputs(model, BATCHES, names[:1], InputPeak)[names[0]].value
        largest = torch.stack([model.get_submodule(name).weight.abs().amax(0) for name in names]).amax(0)
        torch.testing.assert_close(peak, largest, rtol=1e-3, atol=1e-3)


def test_smoothed_copy_is_deleted_and_the_checkpoint_left_alone(tiny_checkpoint, tmp_path):
    with smoothed(tiny_checkpoint, BATCHES, LLAMA, LINEARS, 0.5, tmp_path) as copy:
        ours, theirs = load_model(copy).state_dict(), load_model(tiny_checkpoint).state_dict()
        name = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(ours[name], theirs[name])
        assert torch.equal(
            ours["model.layers.0.self_attn.o_proj.weight"], theirs["model.layers.0.self_attn.o_proj.weight"]
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ignored", ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"])
@torch.no_grad()
def test_steps_with_a_layer_left_alone_are_left_alone(tiny_checkpoint, ignored):
    model, original = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    smooth_(model, LLAMA, BATCHES, [name for name in LINEARS if name != ignored], 0.5)
    assert torch.equal(model.get_submodule(ignored).weight, original.get_submodule(ignored).weight)
