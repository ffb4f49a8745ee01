import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from tasks.calibration.tensor_files import Tensors, TensorWriter, metadata, save_whole

RNG = np.random.default_rng(0)
ARRAYS = {
    "b.weight": RNG.standard_normal((3, 5), dtype=np.float32),
    "a.weight_packed": RNG.integers(-(2**31), 2**31, (3, 7)).astype(np.int32),
    "a.weight_shape": np.array([3, 50], np.int64),
    "a.weight_scale": RNG.standard_normal((3, 1)).astype(np.float16),
    "a.weight_zero_point": RNG.integers(-8, 8, (3, 1)).astype(np.int8),
    "c.weight": RNG.integers(-128, 128, (3, 3)).astype(np.int8),
}


@pytest.mark.parametrize("names", [sorted(ARRAYS), sorted(ARRAYS, reverse=True)])
def test_a_file_is_what_the_safetensors_library_writes_whatever_the_order(tmp_path, names):
    save_file(ARRAYS, tmp_path / "expected", metadata={"format": "pt"})
    with TensorWriter(tmp_path) as writer:
        for name in names:
            writer.add({name: ARRAYS[name]})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert writer.size_bytes == sum(array.nbytes for array in ARRAYS.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model.safetensors"]


def test_tensors_of_whole_files_are_taken_over(tmp_path):
    out, part = tmp_path / "out", tmp_path / "part.safetensors"
    out.mkdir()
    names = sorted(ARRAYS)
    save_whole(part, {name: ARRAYS[name] for name in names[:3]}, {"about": "three"})
    assert metadata(part) == {"about": "three"}
    with TensorWriter(out) as writer:
        writer.add_file(part)
        assert names[0] in writer
        assert names[3] not in writer
        writer.add({name: ARRAYS[name] for name in names[3:]})
    save_file(ARRAYS, tmp_path / "expected", metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert part.exists()


def test_large_checkpoints_are_split_and_read_back(tmp_path):
    arrays = {f"layer{index}.weight": np.full((4, 8), index, dtype=np.float32) for index in range(5)}
    with TensorWriter(tmp_path, max_file_bytes=300) as writer:
        for name, array in arrays.items():
            writer.add({name: array})
    assert [len(load_file(path)) for path in sorted(tmp_path.glob("model-*-of-00003.safetensors"))] == [2, 2, 1]
    with Tensors(tmp_path) as tensors:
        assert tensors.names == sorted(arrays)
        assert all(np.array_equal(tensors.floats(name), array) for name, array in arrays.items())
        assert all(np.array_equal(tensors.copy(name).numpy(), array) for name, array in arrays.items())


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(KeyError, match="complex64"), TensorWriter(tmp_path) as writer:
        writer.add(ARRAYS | {"wave": np.zeros(3, np.complex64)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copies_and_rows_are_the_stored_values_as_float32(tmp_path, dtype):
    table = torch.randn(6, 5).to(dtype)
    save_tensors({"first": torch.zeros(3, dtype=torch.int8), "table": table}, tmp_path / "model.safetensors")
    index = torch.tensor([[0, 5], [2, 2]])
    with Tensors(tmp_path) as tensors:
        assert torch.equal(tensors.copy("table"), table.float())
        assert torch.equal(tensors.rows("table", index), table.float()[index])
        assert tensors.copy("table").dtype == tensors.rows("table", index).dtype == torch.float32
        with pytest.raises(IndexError):
            tensors.rows("table", torch.tensor([6]))


def test_a_dtype_that_cannot_be_read_is_named(tmp_path):
    save_tensors({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with Tensors(tmp_path) as tensors, pytest.raises(ValueError, match=r"w in .* is F8_E4M3"):
        tensors.copy("w")
