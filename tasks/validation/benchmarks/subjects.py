"""What is asked: the original in PyTorch, or a bundle in its engine, as a writer, as a scorer, or as an encoder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.calibration.exported_families import ENCODERS, kind_of
from tasks.engines.text import OnToken, Runtime, Sampling, TextGenerator, Work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.engines.encoder import Encoder
    from tasks.engines.generation import Session


@dataclass(frozen=True)
class Subject:
    """A model that can be asked."""

    path: Path  # the original's checkpoint, or a bundle
    threads: int

    @contextmanager
    def generator(self) -> Iterator[TextGenerator]:
        """It, ready to write.

        Raises:
            ValueError: it writes no text.
        """
        if kind_of(self._family) == "encoder":
            raise ValueError(
                f"This task needs a model that writes; {self._family!r} is an encoder. Use task: embeddings."
            )
        generator = self._bundle_generator() if self._is_bundle else self._original_generator()
        try:
            yield generator
        finally:
            generator.close()

    @contextmanager
    def session(self) -> Iterator[tuple["Session", "PreTrainedTokenizerBase"]]:
        """It, ready to give logits, and its tokenizer.

        Raises:
            ValueError: it is no decoder.
        """
        from tasks.calibration.checkpoints import load_tokenizer
        from tasks.engines.compiling import load_original

        if kind_of(self._family) != "decoder":
            raise ValueError(f"This task needs the likelihood of text, which a decoder gives; got {self._family!r}.")
        session = load_original(self.path, threads=self.threads)
        try:
            yield session, load_tokenizer(self.path)
        finally:
            session.close()

    @contextmanager
    def encoder(self) -> Iterator[tuple["Encoder", "PreTrainedTokenizerBase"]]:
        """It, ready to encode, and its tokenizer.

        Raises:
            ValueError: it is no encoder.
        """
        from tasks.calibration.checkpoints import load_tokenizer
        from tasks.engines.encoder import load_pytorch_encoder

        if kind_of(self._family) != "encoder":
            raise ValueError(
                f"Embeddings need an encoder ({', '.join(ENCODERS)}); got {self._family!r}. Use a task of text instead."
            )
        encoder: Encoder = (
            self._bundle_encoder() if self._is_bundle else load_pytorch_encoder(self.path, threads=self.threads)
        )
        try:
            yield encoder, load_tokenizer(self.path)
        finally:
            encoder.close()

    @property
    def _is_bundle(self) -> bool:
        from tasks.engines.compiling import MANIFEST

        return (self.path / MANIFEST).exists()

    @property
    def _family(self) -> str:
        return str(json.loads((self.path / "config.json").read_text(encoding="utf-8"))["model_type"])

    def _original_generator(self) -> TextGenerator:
        from tasks.engines.compiling import text_generator
        from tasks.engines.pytorch import PyTorch
        from tasks.engines.runtimes import SessionRuntime

        runtime: Runtime
        if kind_of(self._family) == "encoder-decoder":
            runtime = _EncoderDecoder(self.path, self.threads)
        else:
            runtime = SessionRuntime(PyTorch().load(self.path, threads=self.threads))
        return text_generator(runtime, self.path)

    def _bundle_generator(self) -> TextGenerator:
        from tasks.engines.compiling import load_generator

        return load_generator(self.path, threads=self.threads)

    def _bundle_encoder(self) -> "Encoder":
        from tasks.engines.compiling import read_manifest
        from tasks.engines.exported_bundle import load_for

        session: Any = load_for(self.path, read_manifest(self.path).engine, threads=self.threads)
        encoder: Encoder = session
        return encoder


class _EncoderDecoder:
    """transformers' own greedy text of an encoder-decoder, as a `text.Runtime`."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch

        from tasks.quantization.exported_checkpoint import read_checkpoint

        torch.set_num_threads(threads)
        source = read_checkpoint(checkpoint)
        self._model: Any = source.model
        self._model.generation_config = type(self._model.generation_config).from_pretrained(checkpoint)
        self.max_length = source.max_length or 1 << 20  # positions are relative: what memory allows
        self.facts = {"dtype": str(self._model.dtype)}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`."""
        import torch

        num_steps = 0
        for index, prompt in enumerate(prompts):
            with torch.inference_mode():
                out = self._model.generate(
                    torch.tensor([list(prompt)]), max_new_tokens=sampling.max_new_tokens, do_sample=False, num_beams=1
                )
            tokens = out[0, 1:].tolist()  # without the token that the decoder starts with
            num_steps += len(tokens) - 1
            for token in tokens:
                if on_token(index, token) or token in eos_ids:
                    break
        return Work(num_steps=num_steps)

    def close(self) -> None:
        """Frees the weights."""
        self._model = None
