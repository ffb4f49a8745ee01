import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.progress import silent
from tasks.pruning import Width
from tasks.pruning.width import keep_inputs_, keep_outputs_, most_important

LLAMA = architecture("llama")
BATCHES = torch.split(torch.arange(96).view(6, 16), 4)


def test_the_most_important_channels_stay_in_their_order():
    assert most_important(torch.tensor([0.1, 5.0, 0.2, 3.0, 4.0]), 3).tolist() == [1, 3, 4]


def test_cutting_between_two_layers_is_the_same_as_zeroing():
    torch.manual_seed(0)
    first, second, x = nn.Linear(4, 6), nn.Linear(6, 3), torch.randn(5, 4)
    kept = torch.tensor([0, 2, 5])
    mask = torch.zeros(6).index_fill(0, kept, 1)
    expected = second(torch.relu(first(x)) * mask)
    keep_outputs_(first, kept)
    keep_inputs_(second, kept)
    assert (first.out_features, second.in_features) == (3, 3)
    torch.testing.assert_close(second(torch.relu(first(x))), expected)


def test_removing_dead_channels_leaves_the_outputs_alone(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            dead = torch.randperm(128, generator=generator)[:64]
            block.mlp.up_proj.weight[dead] = 0
        expected = model(BATCHES[0]).logits
        layers = Width().layers(LLAMA, 4)
        Width(intermediate_size=64).prune_(model, LLAMA, BATCHES, layers, silent)
        assert model.config.intermediate_size == 64
        torch.testing.assert_close(model(BATCHES[0]).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.no_grad()
def test_dead_channels_of_every_family_are_those_that_go(family_checkpoint, family):
    model, row = load_model(family_checkpoint(family)), architecture(family)
    generator = torch.Generator().manual_seed(0)
    for block in model.get_submodule(row.blocks):
        up = block.get_submodule(row.mlp_inputs[-1])
        dead = torch.randperm(128, generator=generator)[:64] + up.out_features - 128  # behind the gate's, if in one
        up.weight[dead] = 0
        if up.bias is not None:
            up.bias[dead] = 0
    expected = model(BATCHES[0]).logits
    Width(intermediate_size=64).prune_(model, row, BATCHES, Width().layers(row, 3), silent)
    assert getattr(model.config, row.intermediate_size_option) == 64
    assert model.get_submodule(f"{row.block(0)}.{row.mlp_output}").in_features == 64
    torch.testing.assert_close(model(BATCHES[0]).logits, expected, rtol=1e-5, atol=1e-5)


def test_channels_are_chosen_by_their_activity_in_the_unpruned_model(tiny_checkpoint):
    model, original = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    activations = {}
    for index, block in enumerate(original.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, index=index: activations.setdefault(index, []).append(args[0])
        )
    with torch.no_grad():
        for input_ids in BATCHES:
            original(input_ids)
    Width(intermediate_size=32).prune_(model, LLAMA, BATCHES, Width().layers(LLAMA, 4), silent)
    for index, batches in activations.items():
        importance = torch.cat(batches).abs().mean(dim=1).square().sum(dim=0).sqrt()
        kept = sorted(importance.topk(32).indices.tolist())
        before, after = original.model.layers[index].mlp, model.model.layers[index].mlp
        assert torch.equal(after.gate_proj.weight, before.gate_proj.weight[kept])
        assert torch.equal(after.up_proj.weight, before.up_proj.weight[kept])
        assert torch.equal(after.down_proj.weight, before.down_proj.weight[:, kept])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 1152),
        ({"keep": 0.6}, 928),
        ({"keep": 0.001}, 32),
        ({"keep": 0.5, "round_to": 100}, 800),
        ({"intermediate_size": 640}, 640),
    ],
)
def test_sizes_are_rounded(options, size):
    assert Width(**options).size(1536) == size


def test_a_size_that_removes_nothing_is_refused():
    with pytest.raises(ValueError, match="has 128 and 128 would stay"):
        Width(keep=0.9).size(128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "intermediate_size": 64}, "got both"),
        ({"intermediate_size": 100}, "multiple of round_to, 32; got 100"),
        ({"keep": 1.0}, "less than 1"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Width(**options)
