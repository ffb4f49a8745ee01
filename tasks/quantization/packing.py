"""Integers of 1 to 8 bits side by side in 32-bit words, as compressed-tensors stores them.

Element i of a row occupies bits [i * bits, (i + 1) * bits) of the row read as one little-endian bit string, without
gaps; the last word is filled up with zeros. (compressed-tensors 0.20, `compressors/pack_quantized/helpers.py`.)
"""

import numpy as np
from numpy.typing import NDArray


def pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Rows of `bits`-bit integers as words.

    Args:
        values: [rows, columns] uint8, each less than 2 ** bits.
        bits: 1 to 8.

    Returns:
        [rows, ceil(columns * bits / 32)] int32.
    """
    rows, columns = values.shape
    num_words = -(-columns * bits // 32)
    stream: NDArray[np.uint8]
    if bits == 8:
        stream = values
    elif bits == 4:
        even = _padded(values, columns + columns % 2)
        stream = even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
    else:
        bitmap = np.unpackbits(values[:, :, None], axis=2, bitorder="little", count=bits)
        stream = np.packbits(bitmap.reshape(rows, columns * bits), axis=1, bitorder="little")
    return np.ascontiguousarray(_padded(stream, num_words * 4)).view("<i4")


def unpack(words: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.uint8]:
    """What `pack` packed: [rows, columns] uint8."""
    stream = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    rows = stream.shape[0]
    if bits == 8:
        return np.ascontiguousarray(stream[:, :columns])
    if bits == 4:
        pairs = np.stack((stream & 15, stream >> 4), axis=2).reshape(rows, -1)
        return np.ascontiguousarray(pairs[:, :columns])
    bitmap = np.unpackbits(stream, axis=1, bitorder="little", count=columns * bits).reshape(rows, columns, bits)
    return np.packbits(bitmap, axis=2, bitorder="little")[:, :, 0]


def _padded(values: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    return np.pad(values, ((0, 0), (0, columns - values.shape[1])))
