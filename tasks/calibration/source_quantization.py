"""How a source was quantized, kept beside the float checkpoint that its import writes.

`source_quantization/` holds what the source has, unchanged: rows of GGUF blocks under the names and in the order of the
checkpoint's tensors, or the tensors of compressed-tensors; `quantization.json` says which. `method: source` makes the
quantized checkpoint of it (tasks/quantization/source_weights.py). Stages that change weights do not carry it on.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.calibration.tensor_files import DTYPES, Tensors, TensorWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "source_quantization"
DESCRIPTION = "quantization.json"

GGUF_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # of transformers, whose rows keep their blocks when loaded
GGUF_FLOATS = ("F32", "F16", "BF16", "F64")
GGUF_ONE_SCALE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types with one float16 scale for each 32 weights, and at most an offset; of others, the name is kept only."""


def keep_gguf(file: Path, model: "PreTrainedModel", out: Path) -> None:
    """Keep the blocks of a GGUF file whose de-quantized weights are `model`; nothing where all are floats.

    Args:
        file: read through `gguf.GGUFReader`.
        model: as transformers made it of the file.
        out: the checkpoint's directory.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if model.config.model_type not in GGUF_FAMILIES:
        return
    reader = gguf.GGUFReader(file)
    family = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if tensor.name in names}
    types = {names[name]: kind for name, kind in kinds.items() if kind not in GGUF_FLOATS}
    if not types:
        return
    with _record(out, {"format": "gguf", "types": types}) as writer:
        for tensor in reader.tensors:
            if kinds.get(tensor.name) in GGUF_ONE_SCALE:  # rows of bytes, which the loader's order of rows fits too
                rows = processor.process(weights=tensor.data, name=tensor.name).weights
                writer.add({names[tensor.name]: rows})


def keep_compressed_tensors(checkpoint: Path, out: Path) -> None:
    """Keep the quantized weights of the compressed-tensors directory `checkpoint` in that of a checkpoint, `out`."""
    quantization = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    with (
        Tensors(checkpoint) as tensors,
        _record(out, {"format": "compressed-tensors", "quantization_config": quantization}) as writer,
    ):
        for name in tensors.names:
            module, _, parameter = name.rpartition(".")
            if f"{module}.weight_scale" in tensors and parameter.startswith("weight"):
                values = tensors.tensor(name)
                dtype = str(values.dtype).removeprefix("torch.")
                if dtype in DTYPES and not dtype.startswith("float8"):  # which is no integer, and unknown to numpy
                    writer.add({name: (values.float() if dtype == "bfloat16" else values).numpy()})


def _record(out: Path, description: dict[str, Any]) -> TensorWriter:
    folder = out / FOLDER
    folder.mkdir()
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    return TensorWriter(folder)
