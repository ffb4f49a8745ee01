"""Where an engine begins to differ from PyTorch: the model cut after one block, two, and so on, compiled and compared.

Both sides compute embedding, the first blocks, final norm and LM head of a cut checkpoint, so any engine can be asked,
also one that gives no values of its inside.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasks.calibration.architectures import architecture
from tasks.calibration.tensor_files import Tensors
from tasks.engines.generation import Ids
from tasks.engines.parity import Tolerance, ask, compare
from tasks.engines.reference import StreamedPyTorch

if TYPE_CHECKING:
    from tasks.engines import Engine


def first_difference(
    checkpoint: Path, engine: "Engine", windows: Ids, tolerance: Tolerance, *, threads: int
) -> tuple[str, str]:
    """The first layer with which an engine is beyond a tolerance, and by what.

    Args:
        checkpoint: what the engine differs on as a whole.
        windows: [num_windows, length] token ids that show it.

    Returns:
        The block's name, or that of embedding and LM head where these differ without any block; and what is beyond.
    """
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    family = architecture(config["model_type"])
    num_layers = int(config[family.num_layers_option])
    if why := _broken(checkpoint, 1, engine, windows, tolerance, threads):
        return f"{family.block(0)} (or {family.embedding}, {family.final_norm} or {family.lm_head})", why
    low, high, why = 1, num_layers, "it shows with all blocks only"  # well with `low` blocks, not with `high`
    while high - low > 1:
        middle = (low + high) // 2
        if broken := _broken(checkpoint, middle, engine, windows, tolerance, threads):
            high, why = middle, broken
        else:
            low = middle
    return family.block(high - 1), why


def _broken(
    checkpoint: Path, num_layers: int, engine: "Engine", windows: Ids, tolerance: Tolerance, threads: int
) -> str | None:
    with TemporaryDirectory() as folder:
        part, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        part.mkdir()
        bundle.mkdir()
        cut(checkpoint, num_layers, part)
        engine.compile(part, bundle)
        session = engine.load(bundle, threads=threads)
        try:
            said = ask(session, windows)
        finally:
            session.close()
        return tolerance.broken_by(compare(said, StreamedPyTorch(part, threads=threads), windows))


def cut(checkpoint: Path, num_layers: int, out: Path) -> None:
    """Writes the first blocks of a checkpoint, with embedding, final norm and LM head, as a checkpoint."""
    from safetensors.torch import save_file

    from tasks.calibration.checkpoints import copy_tokenizer

    config = json.loads((checkpoint / "config.json").read_text())
    family = architecture(config["model_type"])
    dropped = tuple(f"{family.block(i)}." for i in range(num_layers, int(config[family.num_layers_option])))
    config[family.num_layers_option] = num_layers
    for option in family.per_layer_options:
        if config.get(option):
            config[option] = config[option][:num_layers]
    if quantization := config.get("quantization_config"):
        for group in quantization["config_groups"].values():
            group["targets"] = [name for name in group["targets"] if not f"{name}.".startswith(dropped)]
        quantization["config_groups"] = {
            name: group for name, group in quantization["config_groups"].items() if group["targets"]
        }
        quantization["ignore"] = [
            name for name in quantization.get("ignore") or [] if not f"{name}.".startswith(dropped)
        ]
    (out / "config.json").write_text(json.dumps(config, indent=1))
    with Tensors(checkpoint) as tensors:
        kept = {name: tensors.tensor(name) for name in tensors.names if not name.startswith(dropped)}
        save_file(kept, out / "model.safetensors", {"format": "pt"})
    copy_tokenizer(checkpoint, out)
