import numpy as np
import pytest
import torch

from tasks.quantization.packing import pack, unpack


def test_four_bits_fill_a_word_from_the_low_end():
    assert pack(np.array([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=np.uint8), 4).view(np.uint32).tolist() == [[0x87654321]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 45, 64])
def test_unpack_undoes_pack_and_both_agree_with_compressed_tensors(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    values = np.random.default_rng(bits).integers(0, 2**bits, (5, columns)).astype(np.uint8)
    words = pack(values, bits)
    assert np.array_equal(unpack(words, bits, columns), values)
    signed = torch.from_numpy((values.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))
    assert np.array_equal(words, pack_to_int32(signed, bits).numpy())
    assert torch.equal(unpack_from_int32(torch.from_numpy(words), bits, torch.Size(values.shape)), signed)
