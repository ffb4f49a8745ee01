import pytest
import torch

from tasks.calibration.architectures import architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.layerwise import compress_blocks
from tasks.calibration.statistics import InputGram
from tasks.quantization import Grid
from tasks.quantization.awq import NUM_EXPONENTS, rounded, scale_inputs_, search

LLAMA = architecture("llama")
INT4 = Grid(bits=4, group_size=16)
TOKENS = torch.arange(96).view(6, 16)


def seen(x):
    gram = InputGram(x.shape[-1])
    gram.update(x)
    return gram


def outputs_error(weights, scale, x):
    total = 0.0
    for weight in weights:
        difference = rounded(weight * scale, INT4, "layer") / scale - weight
        total += float((x @ difference.T).double().square().sum())
    return total


def test_the_scales_are_the_best_of_all_that_are_tried():
    torch.manual_seed(0)
    weights = [torch.randn(8, 32), torch.randn(4, 32)]
    x = torch.randn(100, 32)
    x[:, :2] *= 30
    magnitude = x.abs().mean(dim=0)
    tried = []
    for step in range(NUM_EXPONENTS):
        scale = magnitude ** (step / NUM_EXPONENTS)
        tried.append(outputs_error(weights, scale / (scale.max() * scale.min()).sqrt(), x))
    found = search(weights, seen(x), [INT4, INT4], ["a", "b"])
    assert outputs_error(weights, found, x) == pytest.approx(min(tried), rel=1e-3)
    assert outputs_error(weights, found, x) < 0.5 * outputs_error(weights, torch.ones(32), x)
    assert found[:2].min() > found[2:].max()  # large inputs are scaled down, their weights up


def test_equal_inputs_are_left_as_they_are():
    x = torch.eye(16).repeat(4, 1)
    torch.testing.assert_close(search([torch.randn(8, 16)], seen(x), [INT4], ["a"]), torch.ones(16))


def test_the_float_model_computes_the_same(tiny_checkpoint):
    model, original = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    grids = dict.fromkeys(LLAMA.all_linears(4), INT4)
    changed = {}

    def prepare_(block, inputs):
        changed.update(scale_inputs_(model, LLAMA, block, inputs, grids))

    compress_blocks(model, LLAMA, [TOKENS], grids, InputGram, lambda *_: None, step_by_step=True, prepare_=prepare_)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, original(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert len(changed) == 2 * 4
    for name, weight in changed.items():
        assert torch.equal(model.state_dict()[name], weight)
        assert not torch.equal(original.state_dict()[name], weight)
    up = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[up], original.state_dict()[up])


def test_layers_left_alone_are_not_scaled(tiny_checkpoint):
    model, original = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    names = LLAMA.all_linears(4)
    grids = {name: INT4 for name in names if not name.endswith(("k_proj", "up_proj"))}
    inputs = {
        f"model.layers.0.{step[0]}": seen(torch.randn(50, 128 if "down" in step[0] else 64)) for step in LLAMA.steps
    }
    with torch.no_grad():
        assert scale_inputs_(model, LLAMA, "model.layers.0", inputs, grids) == {}
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
