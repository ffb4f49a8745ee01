import pytest
import torch

from tasks.calibration.architectures import architecture
from tasks.calibration.checkpoints import load_model
from tasks.calibration.layerwise import compress_blocks, observe_inputs
from tasks.calibration.statistics import InputNorm

LLAMA = architecture("llama")
BATCHES = torch.split(torch.arange(96).view(6, 16), 4)


class Inputs:
    """Keeps every input."""

    def __init__(self, in_features):
        self.in_features = in_features
        self.seen = []

    def update(self, x):
        self.seen.append(x.clone())


def inputs_in_a_real_forward(model, layers):
    seen = {name: [] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].clone())
        )
        for name in layers
    ]
    with torch.no_grad():
        for input_ids in BATCHES:
            model(input_ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tensors) for name, tensors in seen.items()}


def halve_(name, weight, statistic):
    weight.mul_(0.5)


def test_every_layer_sees_what_it_gets_in_a_model_whose_earlier_blocks_are_compressed(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    layers = LLAMA.all_linears(4)
    collected = {}

    def compress_(name, weight, statistic):
        collected[name] = torch.cat(statistic.seen)
        weight.mul_(0.5)

    compress_blocks(model, LLAMA, BATCHES, layers, Inputs, compress_)
    assert list(collected) == layers
    for index in range(4):
        half_done = load_model(tiny_checkpoint)
        with torch.no_grad():
            for name in LLAMA.all_linears(index):
                half_done.get_submodule(name).weight.mul_(0.5)
        block = [name for name in layers if name.startswith(LLAMA.block(index) + ".")]
        for name, expected in inputs_in_a_real_forward(half_done, block).items():
            torch.testing.assert_close(collected[name], expected, rtol=1e-5, atol=1e-5)


def test_step_by_step_a_layer_also_sees_the_compressed_layers_of_its_own_block(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    collected = {}

    def compress_(name, weight, statistic):
        collected[name] = torch.cat(statistic.seen)
        weight.mul_(0.5)

    compress_blocks(model, LLAMA, BATCHES, LLAMA.all_linears(4), Inputs, compress_, step_by_step=True)
    assert list(collected) == LLAMA.all_linears(4)
    done = []
    for index in range(2):
        for step in LLAMA.steps:
            names = [f"{LLAMA.block(index)}.{linear}" for linear in step]
            half_done = load_model(tiny_checkpoint)
            with torch.no_grad():
                for name in done:
                    half_done.get_submodule(name).weight.mul_(0.5)
            for name, expected in inputs_in_a_real_forward(half_done, names).items():
                torch.testing.assert_close(collected[name], expected, rtol=1e-5, atol=1e-5)
            done += names


def test_model_is_whole_again_after_the_walk(tiny_checkpoint):
    model, untouched = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    compress_blocks(model, LLAMA, BATCHES, LLAMA.all_linears(4), InputNorm, lambda name, weight, statistic: None)
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]).logits, untouched(BATCHES[0]).logits)
    assert all("forward" not in vars(block) for block in model.model.layers)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_model_is_whole_again_after_an_error(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    outside = torch.full((1, 4), 600)  # not in the vocabulary
    with pytest.raises(IndexError):
        compress_blocks(model, LLAMA, [outside], LLAMA.all_linears(4), InputNorm, halve_)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_only_the_named_layers_change(tiny_checkpoint):
    model, before = load_model(tiny_checkpoint), load_model(tiny_checkpoint).state_dict()
    named = ["model.layers.1.mlp.up_proj", "model.layers.3.self_attn.q_proj"]
    compress_blocks(model, LLAMA, BATCHES, named, InputNorm, halve_)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{name}.weight" for name in named]


def test_blocks_that_return_a_tuple_are_walked_alike(tiny_checkpoint):
    def norms(model):
        found = {}
        compress_blocks(
            model, LLAMA, BATCHES, LLAMA.all_linears(4), InputNorm, lambda name, w, s: found.setdefault(name, s.value)
        )
        return found

    plain, tuples = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    kind = type(tuples.model.layers[0])
    returning_tuples = type("TupleBlock", (kind,), {"forward": lambda self, *a, **k: (kind.forward(self, *a, **k),)})
    for block in tuples.model.layers:
        block.__class__ = returning_tuples
    expected = norms(plain)

    class Unpacking(torch.nn.ModuleList):
        """As models did whose blocks return tuples: takes the first item of what a block returns."""

        def __getitem__(self, index):
            if isinstance(index, slice):
                return [lambda *a, _block=block, **k: _block(*a, **k)[0] for block in self]
            return super().__getitem__(index)

    tuples.model.layers.__class__ = Unpacking
    for name, norm in norms(tuples).items():
        torch.testing.assert_close(norm, expected[name])


def test_blocks_with_different_attention_masks_get_their_own():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
    )
    model = Qwen2ForCausalLM(config).eval()
    layers = architecture("qwen2").all_linears(2)
    collected = {}
    compress_blocks(
        model,
        architecture("qwen2"),
        BATCHES,
        layers,
        Inputs,
        lambda n, w, s: collected.setdefault(n, torch.cat(s.seen)),
    )
    for name, expected in inputs_in_a_real_forward(model, layers).items():
        torch.testing.assert_close(collected[name], expected, rtol=1e-5, atol=1e-5)


def test_observed_inputs_are_those_of_a_real_forward(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    layers = ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    steps = []
    observed = observe_inputs(model, BATCHES, layers, InputNorm, lambda step, total, _: steps.append((step, total)))
    for name, inputs in inputs_in_a_real_forward(model, layers).items():
        torch.testing.assert_close(observed[name].value, inputs.flatten(0, 1).norm(dim=0))
    assert steps == [(1, 2), (2, 2)]
