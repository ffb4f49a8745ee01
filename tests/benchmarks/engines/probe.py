"""What this machine can do at best: how fast it reads memory, and how fast it multiplies. Prints one JSON line.

Bandwidth: the faster of two ways to read a float32 matrix once, torch's sum and its product with a vector, best of a
second; by the matrix' size, because what fits into the last-level cache is read faster. The matrix is read again and
again, as a model's weights are.
Products: the best of a second of torch.mm of square matrices (float32, bfloat16), and for int8 of torch._int_mm and of
ONNX Runtime's MatMulInteger (unsigned inputs, signed weights).
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

SIZES_MB = (32, 64, 96, 128, 192, 256, 384, 512, 768)
SIDE = 2048


def best_s(function: Callable[[], object], budget_s: float = 1.0) -> float:
    """The shortest of as many calls as fit into the budget, at least three, after one that is not timed."""
    function()
    times: list[float] = []
    ends_at = time.perf_counter() + budget_s
    while len(times) < 3 or time.perf_counter() < ends_at:
        started_at = time.perf_counter()
        function()
        times.append(time.perf_counter() - started_at)
    return min(times)


def bandwidth_gb_s(size_mb: int) -> float:
    matrix = torch.ones(size_mb * 1_000_000 // 4 // 4096, 4096)
    vector = torch.ones(4096)
    elapsed_s = min(best_s(lambda: matrix.sum(), 0.4), best_s(lambda: matrix @ vector, 0.4))
    return matrix.nbytes / elapsed_s / 1e9


def product_tera_ops(dtype: torch.dtype) -> float:
    a, b = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2 * SIDE**3 / best_s(lambda: multiply(a, b)) / 1e12


def onnxruntime_int8_tera_ops(threads: int) -> float:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((SIDE, SIDE), np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [SIDE, SIDE])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.ones((SIDE, SIDE), np.uint8)
    return 2 * SIDE**3 / best_s(lambda: session.run(None, {"x": x})) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    found = {
        "bandwidth_gb_s": {str(size): bandwidth_gb_s(size) for size in SIZES_MB},
        "float32_tera_ops": product_tera_ops(torch.float32),
        "bfloat16_tera_ops": product_tera_ops(torch.bfloat16),
        "int8_tera_ops": max(product_tera_ops(torch.int8), onnxruntime_int8_tera_ops(threads)),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
