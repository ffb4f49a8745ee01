import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from tasks.validation.continuations import continue_greedily
from tasks.validation.quality import (
    MAX_REFERENCE_BYTES,
    Quality,
    kl_divergence,
    likeliest,
    load_evaluation,
    measure_quality,
    measure_reference,
    measured,
    num_kl_positions,
    num_shared,
    sample_positions,
    score_window,
)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    summary = measure_reference(
        checkpoint=tiny_checkpoint, data=small_data, options=Quality(num_kl_positions=40), threads=1, out=out
    )
    return out, summary


def measure(bundle, reference, data, out, **options):
    options = Quality(num_kl_positions=40, **options)
    return measure_quality(bundle=bundle, reference=reference, data=data, options=options, threads=1, out=out)


def test_scores_of_a_window_are_the_definition_in_float64():
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(150, 37))).astype(np.float32)  # more rows than one chunk
    targets = rng.integers(0, 37, 150).astype(np.int32)
    positions = np.array([0, 63, 64, 149])
    scores = score_window(logits, targets, positions)
    for row in range(150):
        exact = logits[row].astype(float)
        log_p = exact - math.log(sum(math.exp(v) for v in exact))
        # float32 logits near 20 have a spacing of 2e-6
        assert scores.nll[row] == pytest.approx(-log_p[targets[row]], abs=1e-5)
        assert scores.top1[row] == max(range(37), key=lambda k, row=row: logits[row, k])
        assert list(scores.top5[row]) == sorted(range(37), key=lambda k, row=row: -logits[row, k])[:5]
        if row in positions:
            stored = scores.log_probabilities[list(positions).index(row)]
            np.testing.assert_allclose(stored, log_p, atol=1e-5)


def test_shared_tokens_are_counted_whatever_their_order():
    first, second = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 9], [4, 5, 6]])
    assert num_shared(first, second) == 2 + 3


def test_what_is_written_greedily_can_be_left_out(reference, tiny_checkpoint, tiny_bundle, small_data, tmp_path):
    out = tmp_path / "reference"
    out.mkdir()
    options = Quality(num_kl_positions=40, greedy_tokens=0)
    measure_reference(checkpoint=tiny_checkpoint, data=small_data, options=options, threads=1, out=out)
    summary = measure(tiny_bundle, out, small_data, tmp_path, greedy_tokens=0)
    assert summary.greedy_match_tokens is None
    assert "greedy_match_tokens" not in measured(summary)
    assert "greedy_match_tokens" not in [metric.name for metric in options.metrics()]
    assert measured(summary)["top5_agreement"].value == summary.top5_agreement


def test_logits_that_are_not_finite_are_refused():
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        score_window(logits, np.zeros(3, np.int32), np.array([], np.int64))


def test_kl_is_the_definition_zero_for_equals_and_directed():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    log_p, log_q = np.log(p).astype(np.float32), np.log(q).astype(np.float32)
    assert kl_divergence(log_p, log_q) == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2)], rel=1e-6)
    assert kl_divergence(log_p, log_p) == [0.0]
    skewed = np.log([[0.9, 0.05, 0.05]]).astype(np.float32)
    assert kl_divergence(log_p, skewed) != pytest.approx(kl_divergence(skewed, log_p), rel=0.1)


def test_perplexity_of_the_original_is_what_transformers_computes(reference, tiny_checkpoint, small_data):
    import torch
    from transformers import AutoModelForCausalLM

    _, summary = reference
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(small_data / "evaluation.npy").astype(np.int64))
    with torch.no_grad():
        mean_nll = model(input_ids=tokens, labels=tokens).loss.item()  # equal windows: mean of means is the total's
    assert summary.perplexity.value == pytest.approx(math.exp(mean_nll), rel=1e-4)
    assert (summary.num_windows, summary.window, summary.num_tokens) == (6, 48, 6 * 47)
    assert summary.perplexity.low < summary.perplexity.value < summary.perplexity.high
    num_bytes = sum(json.loads((small_data / "data.json").read_text())["evaluation_bytes_per_window"])
    assert summary.bits_per_byte.value == pytest.approx(mean_nll * 6 * 47 / math.log(2) / num_bytes, rel=1e-4)


def test_the_same_model_in_another_engine_agrees_up_to_rounding(reference, tiny_bundle, small_data, tmp_path):
    summary = measure(tiny_bundle, reference[0], small_data, tmp_path)
    assert summary.top1_agreement.value > 0.99
    assert summary.top5_agreement.value > 0.99
    assert summary.greedy_match_tokens.value == summary.greedy_tokens == 32
    assert abs(summary.perplexity_increase_percent.value) < 0.01
    assert 0 <= summary.kl_nats.value < 1e-6
    assert summary.original_perplexity == pytest.approx(reference[1].perplexity.value)


def test_a_damaged_model_is_told_from_the_original(reference, compile_damaged, small_data, tmp_path):
    summary = measure(compile_damaged(0.05), reference[0], small_data, tmp_path)
    assert 0.5 < summary.top5_agreement.value < 0.99
    assert 0 < summary.greedy_match_tokens.value < 32
    assert summary.kl_nats.low > 1e-4
    assert summary.top1_agreement.value < 0.99

    items = pd.read_parquet(tmp_path / "items.parquet")
    assert list(items["num_tokens"]) == [47] * 6
    assert summary.num_kl_positions == items["num_kl_positions"].sum() == 40
    assert math.exp(items["nll"].sum() / items["num_tokens"].sum()) == pytest.approx(summary.perplexity.value)
    assert items["num_same_top5"].sum() / (5 * 6 * 47) == pytest.approx(summary.top5_agreement.value)
    assert items["num_greedy_matching"].mean() == pytest.approx(summary.greedy_match_tokens.value)
    assert items["num_same_top1"].sum() / (6 * 47) == pytest.approx(summary.top1_agreement.value)
    increase = 100 * math.expm1((items["nll"] - items["original_nll"]).sum() / (6 * 47))
    assert increase == pytest.approx(summary.perplexity_increase_percent.value)


def test_reference_bytes_repeat(reference, tiny_checkpoint, small_data, tmp_path):
    options = Quality(num_kl_positions=40)
    measure_reference(checkpoint=tiny_checkpoint, data=small_data, options=options, threads=1, out=tmp_path)
    for file in reference[0].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_reference_of_other_windows_is_refused(reference, tiny_bundle, small_data, tmp_path):
    other = tmp_path / "reference"
    shutil.copytree(reference[0], other)
    about = json.loads((other / "reference.json").read_text())
    (other / "reference.json").write_text(json.dumps(about | {"evaluation_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="same evaluation windows"):
        measure(tiny_bundle, other, small_data, tmp_path)


def test_another_vocabulary_is_refused(reference, tiny_bundle, small_data, tmp_path):
    other = tmp_path / "reference"
    shutil.copytree(reference[0], other)
    about = json.loads((other / "reference.json").read_text())
    (other / "reference.json").write_text(json.dumps(about | {"vocab_size": 49152}))
    with pytest.raises(ValueError, match=r"candidate has 512 tokens, the original 49152"):
        measure(tiny_bundle, other, small_data, tmp_path)


def test_windows_longer_than_the_model_reads_are_refused(tiny_checkpoint, small_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    np.save(data / "evaluation.npy", np.zeros((1, 600), np.int32))
    with pytest.raises(ValueError, match=r"at most 512 tokens; evaluation windows have 600"):
        measure_reference(checkpoint=tiny_checkpoint, data=data, options=Quality(), threads=1, out=tmp_path)


def test_progress_is_told_window_by_window(tiny_checkpoint, small_data, tmp_path):
    told = []
    measure_reference(
        checkpoint=tiny_checkpoint,
        data=small_data,
        options=Quality(num_kl_positions=1),
        threads=1,
        out=tmp_path,
        report=lambda step, total, metrics: told.append((step, total, metrics["perplexity"])),
    )
    assert [step for step, _, _ in told] == [1, 2, 3, 4, 5, 6]
    assert {total for _, total, _ in told} == {6}


def test_the_original_has_all_threads_again_for_what_it_writes(tiny_checkpoint, small_data, tmp_path, monkeypatch):
    threads = []

    def noting(*arguments):
        threads.append(torch.get_num_threads())
        return continue_greedily(*arguments)

    monkeypatch.setattr("tasks.validation.quality.continue_greedily", noting)
    before, options = torch.get_num_threads(), Quality(num_kl_positions=1, num_greedy_prompts=1)
    try:
        measure_reference(checkpoint=tiny_checkpoint, data=small_data, options=options, threads=2, out=tmp_path)
    finally:
        torch.set_num_threads(before)
    assert threads == [2]


def test_positions_are_drawn_without_repetition_and_predict_a_token():
    positions = sample_positions((4, 10), 20, seed=3)
    assert len({tuple(p) for p in positions}) == 20
    assert positions[:, 1].max() <= 8
    assert sorted(map(tuple, positions)) == list(map(tuple, positions))
    assert len(sample_positions((4, 10), 1000, seed=3)) == 36
    assert not np.array_equal(positions, sample_positions((4, 10), 20, seed=4))


def test_stored_distributions_are_bounded_whatever_the_vocabulary():
    assert num_kl_positions(Quality(num_kl_positions=512), 49_152) == 512
    assert num_kl_positions(Quality(num_kl_positions=512), 152_000) * 152_000 * 4 <= MAX_REFERENCE_BYTES


def test_evaluation_is_what_was_prepared(small_data):
    evaluation = load_evaluation(small_data)
    assert evaluation.tokens.shape == (6, 48)
    assert len(evaluation.documents) == len(evaluation.num_bytes) == 6
    assert evaluation.num_bytes.min() > 47


@pytest.mark.parametrize("vocab_size", [7, 300, 64 * 20, 64 * 20 + 1, 49152])
def test_the_likeliest_tokens_are_those_of_a_whole_sort(vocab_size):
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    assert (likeliest(logits, 5) == logits.argsort(dim=-1, descending=True)[:, :5]).all()
