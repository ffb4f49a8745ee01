"""What this machine can do at best, measured: how fast it reads memory, and how fast it multiplies.

These are bounds. A token at batch size 1 reads every weight once, so no engine makes one in less than the weights'
bytes / the bandwidth; a prompt of n tokens takes two operations per weight and token, so no engine reads one faster
than the products allow. What claims to be faster was measured wrongly; what is near one of the two is bound by it, and
gains by nothing that leaves it as it is (Williams, Waterman & Patterson, Roofline, CACM 52(4), 2009).

Bandwidth is that of float32 matrices that are read over and over as weights are, in pieces, by torch's sum and by its
product with a vector; by the matrix' size, because what fits into the last-level cache is read faster. Products are
square, of one thread, times the threads: torch.mm (float32, bfloat16), and for int8 the faster of torch's and ONNX
Runtime's integer products. What else runs on the machine can only make a try slower, so each figure is that of the
fastest tries, which are short enough to fall between what others do.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

Kind = Literal["float32", "bfloat16", "int8"]

SIZES_MB = (16, 64, 256)
PIECE = (250, 4000)
"""Of a matrix that is read, and timed alone: 4 MB of float32."""
FASTEST = 0.05
"""Of the pieces' times, the one that counts: the fastest twentieth is not slower."""
SIDES = (256, 1024)
"""Of the square matrices that are multiplied, 2 side^3 operations; larger ones while they are fast."""
LONG_S = 0.005
TRY_S = 0.1
"""Tries of each way to do each thing, in seconds; at least three are made."""


class Machine(BaseModel, frozen=True, extra="forbid"):
    """The measured limits of a machine with a number of threads."""

    threads: int
    read_bytes_per_s: dict[int, float] = Field(description="By the bytes that are read over and over.")
    operations_per_s: dict[Kind, float] = Field(
        description="Multiplications and additions by the type of what is multiplied; one of each is two operations."
    )

    def bandwidth(self, size_bytes: float) -> float:
        """Bytes per second when `size_bytes` are read over and over, between two measured sizes linearly."""
        sizes = sorted(self.read_bytes_per_s)
        return float(np.interp(size_bytes, sizes, [self.read_bytes_per_s[size] for size in sizes]))

    def best_with(self, other: "Machine") -> "Machine":
        """The better of two measurements, figure by figure; both are of the same sizes and kinds."""
        return Machine(
            threads=self.threads,
            read_bytes_per_s={key: max(r, other.read_bytes_per_s[key]) for key, r in self.read_bytes_per_s.items()},
            operations_per_s={key: max(r, other.operations_per_s[key]) for key, r in self.operations_per_s.items()},
        )


@cache
def machine(threads: int) -> Machine:
    """This machine's limits, measured in about two seconds, once per process."""
    return measure(threads)


def measure(threads: int, *, sizes_mb: tuple[int, ...] = SIZES_MB, try_s: float = TRY_S) -> Machine:
    """This machine's limits with `threads` threads.

    Args:
        threads: that read at the same time, and that products are counted for.
        sizes_mb: megabytes (10^6 bytes) of the matrices that are read, multiples of 4.
        try_s: seconds for each way of reading and of multiplying.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            read = {size * 1_000_000: _read_bytes_per_s(size, try_s) for size in sizes_mb}
            torch.set_num_threads(1)
            one: dict[Kind, float] = {
                "float32": _operations_per_s(_torch_product(torch.float32), try_s),
                "bfloat16": _operations_per_s(_torch_product(torch.bfloat16), try_s),
                "int8": _operations_per_s(_torch_product(torch.int8), try_s),
            }
        if onnxruntime := _onnxruntime_product():
            one["int8"] = max(one["int8"], _operations_per_s(onnxruntime, try_s))
    finally:
        torch.set_num_threads(before)
    return Machine(
        threads=threads,
        read_bytes_per_s=read,
        operations_per_s={kind: threads * rate for kind, rate in one.items()},
    )


def _read_bytes_per_s(size_mb: int, try_s: float) -> float:
    import torch

    vector = torch.ones(PIECE[1])
    pieces = list(torch.ones(max(1, size_mb // 4), *PIECE))
    ways: list[Callable[[torch.Tensor], object]] = [torch.sum, lambda piece: piece @ vector]
    times = [np.quantile(times_s([partial(way, piece) for piece in pieces], try_s), FASTEST) for way in ways]
    return float(pieces[0].nbytes / min(times))


def _operations_per_s(product_of: Callable[[int], Callable[[], object]], try_s: float) -> float:
    """Of the fastest product of square matrices; `product_of(side)` multiplies two when it is called."""
    fastest = 0.0
    for side in SIDES:
        elapsed_s = min(times_s([product_of(side)], try_s))
        fastest = max(fastest, 2 * side**3 / elapsed_s)
        if elapsed_s > LONG_S:
            break
    return fastest


def times_s(functions: Sequence[Callable[[], object]], try_s: float) -> list[float]:
    """Seconds of single calls of `functions` in turn, for `try_s` and at least three rounds after one not timed."""
    for function in functions:
        function()
    times: list[float] = []
    ends_at = time.perf_counter() + try_s
    while len(times) < 3 * len(functions) or time.perf_counter() < ends_at:
        for function in functions:
            started_at = time.perf_counter()
            function()
            times.append(time.perf_counter() - started_at)
    return times


def _torch_product(dtype: Any) -> Callable[[int], Callable[[], object]]:
    import torch

    def product_of(side: int) -> Callable[[], object]:
        a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
        return partial(torch._int_mm if dtype == torch.int8 else torch.mm, a, b)

    return product_of


def _onnxruntime_product() -> Callable[[int], Callable[[], object]] | None:
    """MatMulInteger (unsigned inputs, signed weights); None where ONNX Runtime is missing."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def product_of(side: int) -> Callable[[], object]:
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, [side, side])],
            [helper.make_tensor_value_info("y", TensorProto.INT32, [side, side])],
            [numpy_helper.from_array(np.ones((side, side), np.int8), "weight")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return partial(session.run, None, {"x": np.ones((side, side), np.uint8)})

    return product_of


def main() -> None:
    """Prints this machine's limits as one line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=2)
    sys.stdout.write(measure(parser.parse_args().threads).model_dump_json() + "\n")
