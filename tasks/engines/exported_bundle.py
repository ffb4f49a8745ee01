"""Bundles of encoders and encoder-decoders: what an engine takes of them, how close they are to PyTorch, their text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.engines.encoder import EncoderParity, EncoderSession, PyTorchEncoder, compare_encoders
from tasks.engines.encoder_decoder import EncoderDecoderParity, EncoderDecoderSession, compare_with_pytorch
from tasks.engines.exported import compile_exported, load_exported
from tasks.engines.exported_graph import read_pooling
from tasks.engines.text import OnToken, Sampling, Work
from tasks.quantization.exported_checkpoint import read_checkpoint

if TYPE_CHECKING:
    from tasks.engines import Engine
    from tasks.engines.generation import Ids

ExportedParity = EncoderParity | EncoderDecoderParity
USED = ("engine", "precision", "activations")
MAX_ERROR = 0.05  # of an answer, float32 throughout; measured: up to 5e-4 on tiny models, 4e-6 on MiniLM
MIN_COSINE = 0.98  # of a sequence's vectors, inputs in 8 bits; measured on MiniLM: 0.997
MIN_AGREEMENT = 0.9  # of the likeliest tokens, inputs rounded


def compile_for(checkpoint: Path, engine: "Engine", out: Path) -> None:
    """Writes the engine's graphs of an encoder or encoder-decoder into `out`.

    Raises:
        ValueError: the engine has none for these families, an option would be ignored, or see `compile_exported`.
    """
    if problem := cannot_compile(engine):
        raise ValueError(problem)
    assert engine.engine in ("onnxruntime", "openvino")
    compile_exported(checkpoint, engine.engine, out, activations=engine.activations)


def cannot_compile(engine: "Engine") -> str | None:
    """Why encoders and encoder-decoders do not compile for an engine with these options; None if they do."""
    if engine.engine not in ("onnxruntime", "openvino"):
        return f"Encoders and encoder-decoders compile for 'onnxruntime' and 'openvino'; got {engine.engine!r}."
    for name, field in type(engine).model_fields.items():
        if name not in USED and (value := getattr(engine, name)) != field.default:
            return (
                f"{name} applies to decoders with a cache of their own; this is an encoder or encoder-decoder, and "
                f"{name} {value!r} would be ignored. Leave it out."
            )
    return None


def compare_bundle(
    bundle: Path, checkpoint: Path, engine: "Engine", input_ids: "Ids", *, threads: int
) -> tuple[dict[str, str], ExportedParity]:
    """What a bundle says it computes in, and how far it is from PyTorch on sequences [batch, length].

    Raises:
        ValueError: it is beyond the tolerance.
    """
    source = read_checkpoint(checkpoint)
    input_ids = input_ids[:, : source.max_length]
    session = load_for(bundle, engine, threads=threads)
    exact = engine.precision == "float32" and getattr(engine, "activations", "float32") == "float32"
    found: ExportedParity
    try:
        if isinstance(session, EncoderSession):
            found = compare_encoders(session, PyTorchEncoder(source, read_pooling(checkpoint)), input_ids)
            is_close = found.max_abs_error <= MAX_ERROR if exact else found.min_cosine >= MIN_COSINE
        else:
            found = compare_with_pytorch(session, source, input_ids)
            is_close = found.max_abs_error <= MAX_ERROR if exact else found.top1_agreement >= MIN_AGREEMENT
        facts = dict(session.facts)
    finally:
        session.close()
    if not is_close:
        allowed = f"max_abs_error at most {MAX_ERROR}" if exact else f"cosine {MIN_COSINE}, agreement {MIN_AGREEMENT}"
        raise ValueError(
            f"The {engine.engine} bundle must answer as PyTorch does on the same checkpoint ({allowed}); got {found}. "
            "Do not serve it; compile with `activations` float32, or report it with the checkpoint."
        )
    return facts, found


def load_for(bundle: Path, engine: "Engine", *, threads: int) -> EncoderSession | EncoderDecoderSession:
    """A session with the engine's options."""
    assert engine.engine in ("onnxruntime", "openvino")
    return load_exported(bundle, engine.engine, threads, precision=engine.precision)


class EncoderDecoderRuntime:
    """Writes with an encoder-decoder, as a `text.Runtime`: the likeliest tokens, one text after the other."""

    def __init__(self, session: EncoderSession | EncoderDecoderSession) -> None:
        if isinstance(session, EncoderSession):
            raise ValueError(
                "An encoder writes no text. Load it in Python: tasks.engines.exported.load_exported(bundle, engine, "
                "threads).encode(input_ids)."
            )
        self._session = session
        self.max_length = session.max_length or 1 << 20  # positions are relative: what memory allows
        self.facts = dict(session.facts)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`; a text comes as a whole.

        Raises:
            ValueError: it should sample.
        """
        if sampling.temperature > 0:
            raise ValueError(
                f"Encoder-decoders write the likeliest tokens here; got temperature {sampling.temperature:g}. Use 0."
            )
        num_steps = 0
        for index, prompt in enumerate(prompts):
            (tokens,) = self._session.generate(
                np.array([prompt], dtype=np.int64), max_new_tokens=sampling.max_new_tokens
            )
            num_steps += len(tokens) - 1
            for token in tokens:
                if on_token(index, token):
                    break
        return Work(num_steps=num_steps)

    def close(self) -> None:
        """Frees the model."""
        self._session.close()
