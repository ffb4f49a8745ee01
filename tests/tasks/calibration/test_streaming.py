import pytest
import torch

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import empty_model, load_model
from tasks.calibration.layerwise import compress_blocks
from tasks.calibration.streaming import Streamed
from tasks.calibration.tensor_files import Tensors

BATCHES = torch.split(torch.arange(96).view(6, 16), 4)


class Inputs:
    """Keeps every input."""

    def __init__(self, in_features):
        self.seen = []

    def update(self, x):
        self.seen.append(x.clone())


@pytest.fixture
def walk(tmp_path):
    """Halves every layer of a checkpoint; returns each one's inputs and weight as they were."""

    def run(checkpoint, *, streamed=True, first_block=0, last_block=None, watch=None, name="work"):
        model = empty_model(checkpoint) if streamed else load_model(checkpoint)
        family = architecture(model.config.model_type)
        found = {}

        def halve_(layer, weight, inputs):
            if watch:
                watch(model)
            found[layer] = (torch.cat(inputs.seen), weight.clone())
            weight.mul_(0.5)

        def finish(index):
            if index == last_block:
                raise KeyboardInterrupt

        (tmp_path / name).mkdir(exist_ok=True)
        with Tensors(checkpoint) as tensors:
            residence = Streamed(model, family, tensors, tmp_path / name, first_block) if streamed else None
            layers = family.all_linears(model.config.num_hidden_layers)
            arguments = {"step_by_step": True, "residence": residence, "first_block": first_block, "finish": finish}
            try:
                compress_blocks(model, family, BATCHES, layers, Inputs, halve_, **arguments)
            except KeyboardInterrupt:
                assert last_block is not None
        return found

    return run


def assert_same(some, others):
    assert list(some) == list(others)
    for name, tensors in some.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, others[name], strict=True)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_layer_sees_what_it_sees_in_memory_to_the_last_bit(walk, family_checkpoint, family, dtype):
    checkpoint = family_checkpoint(family, dtype)
    assert_same(walk(checkpoint), walk(checkpoint, streamed=False))


def test_the_weights_of_one_block_are_in_memory_and_of_nothing_else(walk, tiny_checkpoint):
    resident = []

    def watch(model):
        resident.append({name for name, parameter in model.named_parameters() if not parameter.is_meta})

    walk(tiny_checkpoint, watch=watch)
    blocks = [resident[7 * index] for index in range(4)]
    for index, names in enumerate(blocks):
        assert len(names) == 9
        assert all(name.startswith(f"model.layers.{index}.") for name in names)
    assert resident == [block for block in blocks for _ in range(7)]


def test_a_walk_goes_on_from_what_an_earlier_one_has_left(walk, family_checkpoint, tmp_path):
    checkpoint = family_checkpoint("qwen2")
    whole = walk(checkpoint, name="whole")
    begun = walk(checkpoint, last_block=0)
    (tmp_path / "work" / "hidden-2.partial").write_bytes(b"half of")
    rest = walk(checkpoint, first_block=1)
    assert_same(begun | rest, whole)
    assert len(rest) == 2 * 7


def test_hidden_states_are_there_once_and_once_more_while_a_block_is_at_work(walk, tiny_checkpoint, tmp_path):
    files = []
    walk(tiny_checkpoint, watch=lambda _: files.append(sorted(path.name for path in (tmp_path / "work").iterdir())))
    assert [files[7 * index] for index in range(4)] == [
        ["hidden-0.npy"],
        ["hidden-0.npy", "hidden-1.npy"],
        ["hidden-1.npy", "hidden-2.npy"],
        ["hidden-2.npy", "hidden-3.npy"],
    ]
    size_bytes = (tmp_path / "work" / "hidden-3.npy").stat().st_size
    assert size_bytes == 96 * 64 * 4 + len(BATCHES) * 128  # and a header for each batch


def test_an_empty_model_has_the_buffers_and_the_ties_of_a_loaded_one(tiny_checkpoint):
    empty, loaded = empty_model(tiny_checkpoint), load_model(tiny_checkpoint)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert dict(empty.named_parameters()).keys() == dict(loaded.named_parameters()).keys()
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, buffers.pop(name))
    assert not buffers
