"""The reference that is read block by block says what the whole model says, whatever the family and the rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.engines import PyTorch, reference
from tasks.engines.families import FAMILIES
from tasks.engines.generation import Ids, Logits
from tasks.engines.parity import Divergence, Greedy, ask, compare, compare_greedy
from tasks.engines.reference import StreamedPyTorch
from tasks.quantization import Activations, Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tests.tasks.engines import tiny_families

IDS = np.random.default_rng(0).integers(0, tiny_families.VOCAB_SIZE, (2, 24))
TEXTS = [(IDS, 24), (IDS[:1, :7], 3), (IDS[1:], 1)]
INT8 = Grid(bits=8)
ROUNDING = 1e-5
"""Of logits below 10: how float32 sums depends on how memory is aligned; of one position it was seen to."""


def assert_as_whole(checkpoint: Path, largest_error: float = ROUNDING) -> None:
    whole = PyTorch(precision="float32").load(checkpoint, threads=1)
    read = list(StreamedPyTorch(checkpoint, threads=1).read(TEXTS))
    assert [logits.shape for logits in read] == [(2, 24, 512), (1, 3, 512), (1, 1, 512)]
    for logits, (input_ids, num_logits) in zip(read, TEXTS, strict=True):
        expected = whole.prefill(input_ids, num_logits)
        assert float(np.abs(expected).max()) > 0.3
        np.testing.assert_allclose(logits, expected, rtol=0, atol=largest_error)


@pytest.mark.parametrize("variant", tiny_families.VARIANTS)
def test_every_family_is_read_as_the_whole_model(variant: str, tmp_path: Path) -> None:
    family, options = tiny_families.VARIANTS[variant]
    assert_as_whole(tiny_families.save(family, options, tmp_path))


def test_every_family_that_engines_take_is_among_them() -> None:
    assert {family for family, _ in tiny_families.VARIANTS.values()} == set(FAMILIES)


ASYMMETRIC = Grid(bits=4, group_size=32, symmetric=False)


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", INT8),
        ("qwen3", ASYMMETRIC),
        ("gemma2", ASYMMETRIC.model_copy(update={"zero_point": "real"})),
        ("opt", Grid(bits=4, group_size=32)),
        ("gpt_neox", ASYMMETRIC),
    ],
)
def test_quantized_weights_are_what_stock_transformers_makes_of_them(
    family: str, weights: Grid, tmp_path: Path
) -> None:
    """Where zero points are real, the library rounds once more than the source did."""
    floats = tiny_families.save(family, tiny_families.FAMILIES[family], tmp_path / "floats")
    quantized = _quantized(floats, RoundToNearest(weights=weights, embeddings=INT8), tmp_path / "quantized")
    assert_as_whole(quantized, 2e-5 if weights.zero_point == "real" else ROUNDING)


@pytest.mark.parametrize("kv_cache", [None, "int8", "float8_e4m3"])
def test_inputs_and_kv_cache_are_rounded_as_the_checkpoint_says(kv_cache: str | None, tmp_path: Path) -> None:
    floats = tiny_families.save("llama", {}, tmp_path / "floats")
    np.save(tmp_path / "calibration.npy", np.random.default_rng(1).integers(0, 512, (16, 32)).astype(np.int32))
    method = RoundToNearest(weights=INT8, activations=Activations(static=("*.down_proj",)), kv_cache=kv_cache)
    quantized = _quantized(floats, method, tmp_path / "quantized", data=tmp_path)
    assert_as_whole(quantized)
    rounds = next(StreamedPyTorch(quantized, threads=1).read(TEXTS))
    exact = next(StreamedPyTorch(floats, threads=1).read(TEXTS))
    assert np.abs(rounds - exact).max() > 1e-3


def test_fp8_weights_are_read(tmp_path: Path) -> None:
    floats = tiny_families.save("llama", {}, tmp_path / "floats")
    np.save(tmp_path / "calibration.npy", np.random.default_rng(1).integers(0, 512, (16, 32)).astype(np.int32))
    float8 = Grid(bits=8, format="float8_e4m3")
    method = RoundToNearest(weights=float8, activations=Activations(format="float8_e4m3", static=("*",)))
    assert_as_whole(_quantized(floats, method, tmp_path / "quantized", data=tmp_path))


def test_files_of_the_bare_model_and_of_other_dtypes_are_read(tmp_path: Path) -> None:
    checkpoint = tiny_families.save("qwen3", tiny_families.FAMILIES["qwen3"], tmp_path)
    tensors = {n: t.bfloat16() for n, t in load_file(checkpoint / "model.safetensors").items()}
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, checkpoint / "model.safetensors"
    )
    assert_as_whole(checkpoint)


def test_weights_of_one_block_are_in_memory_at_a_time(tmp_path: Path) -> None:
    checkpoint = tiny_families.save("llama", {}, tmp_path)
    streamed = StreamedPyTorch(checkpoint, threads=1)
    resident = []

    def watch(module: torch.nn.Module, _: object) -> None:
        names = [name for name, parameter in streamed._model.named_parameters() if not parameter.is_meta]
        resident.append({".".join(name.split(".")[:3]) for name in names})

    for block in streamed._model.model.layers:
        block.mlp.register_forward_pre_hook(watch)
    list(streamed.read(TEXTS[:1]))

    first_twice = (0, 0, 1, 2)  # it says what blocks of its class return
    assert resident == [{f"model.layers.{index}"} for index in first_twice]


def test_the_lm_head_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "HEAD_ROWS", 100)
    floats = tiny_families.save("llama", {}, tmp_path / "floats")
    assert_as_whole(floats)
    assert_as_whole(_quantized(floats, RoundToNearest(weights=INT8, embeddings=INT8), tmp_path / "quantized"))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_families.save("llama", {}, tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        StreamedPyTorch(checkpoint, threads=1)


def test_a_text_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    streamed = StreamedPyTorch(tiny_families.save("llama", {}, tmp_path), threads=1)
    with pytest.raises(ValueError, match="below the vocabulary's 512; got 512 to 512"):
        streamed.read([(np.array([[512]]), 1)])


class Mistaken:
    """A session that says something else than its model after some of the tokens."""

    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, checkpoint: Path, wrong_at: dict[int, float]) -> None:
        self._session = PyTorch(precision="float32").load(checkpoint, threads=1)
        self._wrong_at = wrong_at  # by a sequence's length, what is added to the logit of token 7
        self._length = 0
        self.vocab_size, self.max_length = self._session.vocab_size, self._session.max_length

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        self._length = input_ids.shape[1]
        return self._with_mistakes(self._session.prefill(input_ids, num_logits))

    def decode(self, input_ids: Ids) -> Logits:
        self._length += 1
        return self._with_mistakes(self._session.decode(input_ids)[:, None])[:, 0]

    def _with_mistakes(self, logits: Logits) -> Logits:
        logits[:, -1, 7] += self._wrong_at.get(self._length, 0.0)
        return logits

    def close(self) -> None: ...


@pytest.mark.parametrize("wrong_at", [{}, {24: 9.0}, {17: 9.0, 20: 9.0}, {12: 9.0}])
def test_reading_greedy_text_gives_the_verdict_of_writing_it(wrong_at: dict[int, float], tmp_path: Path) -> None:
    checkpoint = tiny_families.save("llama", tiny_families.FAMILIES["llama"], tmp_path)
    prompts, num_new_tokens = IDS[:, :12], 12
    said = ask(Mistaken(checkpoint, wrong_at), IDS, num_new_tokens=num_new_tokens)

    whole = PyTorch(precision="float32").load(checkpoint, threads=1)
    own, logits = [], [whole.prefill(prompts)[:, -1]]
    while True:
        own.append(logits[-1].argmax(-1))
        if len(own) == num_new_tokens:
            break
        logits.append(whole.decode(own[-1]))
    by_writing = _verdict(np.stack(own, 1), np.stack(logits, 1), said.written)

    streamed = StreamedPyTorch(checkpoint, threads=1)
    assert (by_writing.first_divergence is None) == (not set(wrong_at) & set(range(12, 24)))
    for by_reading in (
        compare_greedy(prompts, said.written, streamed),
        compare(said, streamed, IDS).greedy,
        compare(said, whole, IDS).greedy,
    ):
        _assert_same_verdict(by_reading, by_writing)


def _verdict(own: Ids, logits: Logits, written: Ids) -> Greedy:
    """By comparing two texts token by token, and looking up the logits with which the reference wrote its own."""
    first: Divergence | None = None
    num_same = 0
    for sequence, (ours, theirs) in enumerate(zip(own.tolist(), written.tolist(), strict=True)):
        num_same += ours == theirs
        for position, (expected, got) in enumerate(zip(ours, theirs, strict=True)):
            if expected != got:
                if first is None or position < first.position:
                    gap = float(logits[sequence, position, expected] - logits[sequence, position, got])
                    first = Divergence(sequence=sequence, position=position, logit_gap=gap)
                break
    return Greedy(num_sequences=len(own), num_same=num_same, num_new_tokens=own.shape[1], first_divergence=first)


def _assert_same_verdict(some: Greedy, other: Greedy) -> None:
    assert some.model_copy(update={"first_divergence": None}) == other.model_copy(update={"first_divergence": None})
    if some.first_divergence is None or other.first_divergence is None:
        assert some.first_divergence is other.first_divergence
        return
    assert some.first_divergence.sequence == other.first_divergence.sequence
    assert some.first_divergence.position == other.first_divergence.position
    assert some.first_divergence.logit_gap == pytest.approx(other.first_divergence.logit_gap, abs=1e-4)


def _quantized(checkpoint: Path, method: RoundToNearest, out: Path, data: Path | None = None) -> Path:
    out.mkdir()
    quantize_checkpoint(checkpoint=checkpoint, data=data or checkpoint, method=method, out=out)
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    return out
