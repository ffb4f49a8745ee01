"""How well an engine still answers: perplexity, and agreement with the original, on the same text.

Perplexity is exp(total negative log-likelihood / predicted tokens) over windows that do not overlap (stride = window);
the first token of each window is context only. It is computed from the logits of the engine that will serve, so that
whatever the engine loses counts too. It compares models with the same tokenizer; bits per byte compares any.

Agreement needs no reference text: KL(original ‖ candidate) of the next-token distributions, how often both find the
same token likeliest, how many of the original's five likeliest tokens are among the candidate's, and for how many
tokens greedy text stays the original's (continuations.py).
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tasks.calibration.progress import Report, silent
from tasks.validation.continuations import continue_greedily, num_matching
from tasks.validation.measured import Measured, Metric
from tasks.validation.statistics import (
    CONFIDENCE,
    Estimate,
    bootstrap_difference_of_ratios,
    bootstrap_ratio_of_sums,
    paired_increase_percent,
    scaled,
)

if TYPE_CHECKING:
    import torch

    from tasks.engines.generation import Session

GROUP = 64
"""Tokens of a vocabulary that are searched together for the likeliest."""
ROWS_PER_CHUNK = 16
"""Positions whose log-softmax is held at once: little enough for a processor's cache."""
MAX_REFERENCE_BYTES = 128 * 2**20
"""Bound of the original's stored log-probabilities, 4 bytes per vocabulary entry and position."""
GREEDY = "greedy_match_tokens"
_QUALITY: dict[str, Any] = {"aspect": "quality", "option": "validation.quality"}
METRICS = (
    Metric(name="perplexity", title="perplexity", unit="", better="lower", **_QUALITY),
    Metric(name="bits_per_byte", title="bits per byte", unit="", better="lower", **_QUALITY),
    Metric(
        name="top1_agreement",
        title="top-1 agreement",
        unit="",
        better="higher",
        compared=False,
        largest=1.0,
        **_QUALITY,
    ),
    Metric(
        name="top5_agreement",
        title="top-5 agreement",
        unit="",
        better="higher",
        compared=False,
        largest=1.0,
        **_QUALITY,
    ),
    Metric(name="kl_nats", title="KL from the original", unit="nats", better="lower", compared=False, **_QUALITY),
    Metric(
        name=GREEDY,
        title="greedy match with the original",
        unit="tokens",
        better="higher",
        aspect="quality",
        option="validation.quality.greedy_tokens",
        compared=False,
    ),
)
TOP = 5


class Quality(BaseModel, frozen=True, extra="forbid"):
    """What is measured of every candidate's answers, on the evaluation windows of the data."""

    num_kl_positions: int = Field(
        512,
        ge=1,
        le=100_000,
        description="Positions, drawn over all windows, where whole next-token distributions are compared; "
        "fewer where they would fill more than 128 MiB.",
    )
    greedy_tokens: int = Field(
        32,
        ge=0,
        le=4096,
        description="Tokens written greedily after each prompt, beside the original's; 0: not measured.",
    )
    num_greedy_prompts: int = Field(
        16,
        ge=1,
        description="Prompts: the beginnings of the first so many evaluation windows; fewer if there are fewer.",
    )
    greedy_prompt_tokens: int = Field(64, ge=1, description="Tokens of a prompt; a shorter window is one as a whole.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the drawn positions and of the bootstrap.")

    def metrics(self) -> tuple[Metric, ...]:
        """What these options measure."""
        return tuple(
            metric.model_copy(update={"largest": float(self.greedy_tokens)}) if metric.name == GREEDY else metric
            for metric in METRICS
            if self.greedy_tokens or metric.name != GREEDY
        )


class ReferenceSummary(BaseModel, frozen=True, extra="forbid"):
    """The original on the evaluation windows, in PyTorch and float32."""

    perplexity: Estimate
    bits_per_byte: Estimate
    window: int = Field(description="Tokens per window; the stride is the same.")
    num_windows: int
    num_documents: int
    num_tokens: int = Field(description="Predicted tokens.")
    num_kl_positions: int


class QualitySummary(BaseModel, frozen=True, extra="forbid"):
    """A candidate on the same windows; intervals are 95 %, from resampled documents."""

    perplexity: Estimate
    perplexity_increase: Estimate = Field(description="Over the original on the same windows, paired.")
    perplexity_increase_percent: Estimate = Field(description="Over the original on the same windows, paired.")
    original_perplexity: float
    bits_per_byte: Estimate
    bits_per_byte_increase: Estimate = Field(description="Over the original on the same windows, paired.")
    original_bits_per_byte: float
    top1_agreement: Estimate = Field(description="Fraction of positions where both find the same token likeliest.")
    top5_agreement: Estimate = Field(
        description="Mean fraction of the original's five likeliest tokens that are among the candidate's five."
    )
    kl_nats: Estimate = Field(description="Mean KL(original ‖ candidate) over the drawn positions.")
    greedy_match_tokens: Estimate | None = Field(
        None, description="Mean number of greedy tokens before the first that differs; None: not measured."
    )
    greedy_tokens: int = Field(0, description="Of how many.")
    window: int
    num_windows: int
    num_documents: int
    num_tokens: int
    num_kl_positions: int


@dataclass(frozen=True)
class Evaluation:
    """The evaluation part of a data directory."""

    tokens: NDArray[np.int32]  # [num_windows, window]
    documents: NDArray[np.int32]  # [num_windows], where each window comes from
    num_bytes: NDArray[np.int64]  # [num_windows], UTF-8 bytes of the predicted tokens, all but each window's first
    sha256: str


@dataclass(frozen=True)
class WindowScores:
    """What the logits of one window say; W - 1 positions predict a token."""

    nll: NDArray[np.float32]  # [W - 1], nats
    top1: NDArray[np.int32]  # [W - 1]
    top5: NDArray[np.int32]  # [W - 1, 5], the likeliest tokens, likeliest first
    log_probabilities: NDArray[np.float32]  # [positions asked for, vocab_size]


def measure_reference(
    *, checkpoint: Path, data: Path, options: Quality, threads: int, out: Path, report: Report = silent
) -> ReferenceSummary:
    """The original's answers, in PyTorch or as the engine bundle that it is, for candidates to be compared with.

    Writes nll.npy [num_windows, W - 1] float32, top1.npy [num_windows, W - 1] int32, top5.npy
    [num_windows, W - 1, 5] int32, kl_positions.npy [K, 2] int64 (window, position), kl_log_probabilities.npy
    [K, vocab_size] float32, greedy.npy [num_greedy_prompts, greedy_tokens] int32 and reference.json.

    Raises:
        ValueError: the checkpoint cannot read the windows, or its logits are not finite.
    """
    from tasks.engines.compiling import load_original

    evaluation = load_evaluation(data)
    session = load_original(checkpoint, threads=threads)
    try:
        positions = sample_positions(
            evaluation.tokens.shape, num_kl_positions(options, session.vocab_size), seed=options.seed
        )
        scores = list(_scores(session, evaluation, positions, name="The original", report=report))
        greedy = continue_greedily(session, greedy_prompts(evaluation, options), options.greedy_tokens)
    finally:
        vocab_size = session.vocab_size
        session.close()
    nll = np.stack([window.nll for window in scores])
    np.save(out / "nll.npy", nll)
    np.save(out / "top1.npy", np.stack([window.top1 for window in scores]))
    np.save(out / "top5.npy", np.stack([window.top5 for window in scores]))
    np.save(out / "greedy.npy", greedy)
    np.save(out / "kl_positions.npy", positions)
    np.save(out / "kl_log_probabilities.npy", np.concatenate([window.log_probabilities for window in scores]))
    about = {"evaluation_sha256": evaluation.sha256, "vocab_size": vocab_size, "num_kl_positions": len(positions)}
    (out / "reference.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    per_window, num_tokens = nll.sum(axis=1, dtype=np.float64), np.full(len(nll), nll.shape[1])
    return ReferenceSummary(
        perplexity=bootstrap_ratio_of_sums(
            per_window, num_tokens, evaluation.documents, seed=options.seed, transform=np.exp
        ),
        bits_per_byte=bits_per_byte(per_window, evaluation, seed=options.seed),
        window=evaluation.tokens.shape[1],
        num_windows=len(nll),
        num_documents=len(np.unique(evaluation.documents)),
        num_tokens=nll.size,
        num_kl_positions=len(positions),
    )


def measure_quality(
    *, bundle: Path, reference: Path, data: Path, options: Quality, threads: int, out: Path, report: Report = silent
) -> QualitySummary:
    """The answers of an engine bundle, compared with those that `measure_reference` stored in `reference`.

    Writes items.parquet, one row per window, from which every figure here can be computed again.

    Raises:
        ValueError: vocabularies or evaluation windows differ, the engine cannot read a window, or its logits are not
            finite.
    """
    import pandas as pd

    from tasks.engines.compiling import load_bundle

    evaluation = load_evaluation(data)
    about = json.loads((reference / "reference.json").read_text())
    if about["evaluation_sha256"] != evaluation.sha256:
        raise ValueError(
            f"Candidate and original must read the same evaluation windows; the reference was measured on "
            f"{about['evaluation_sha256'][:12]}, these are {evaluation.sha256[:12]}. Measure the reference again."
        )
    original_nll = np.load(reference / "nll.npy")
    original_top1, original_top5 = np.load(reference / "top1.npy"), np.load(reference / "top5.npy")
    original_greedy = np.load(reference / "greedy.npy")
    positions = np.load(reference / "kl_positions.npy")
    original_log_probabilities = np.load(reference / "kl_log_probabilities.npy", mmap_mode="r")
    session, _ = load_bundle(bundle, threads=threads)
    rows = []
    next_position = 0
    try:
        if session.vocab_size != about["vocab_size"]:
            raise ValueError(
                f"Candidate and original must have the same vocabulary; the candidate has {session.vocab_size} "
                f"tokens, the original {about['vocab_size']}. Compare a candidate that was made from this original."
            )
        scored = _scores(session, evaluation, positions, name="The candidate", report=report)
        for index, window in enumerate(scored):
            beside = slice(next_position, next_position + len(window.log_probabilities))
            next_position = beside.stop
            kl = kl_divergence(np.asarray(original_log_probabilities[beside]), window.log_probabilities)
            rows.append(
                {
                    "window": index,
                    "document": int(evaluation.documents[index]),
                    "num_tokens": len(window.nll),
                    "num_bytes": int(evaluation.num_bytes[index]),
                    "nll": float(window.nll.sum(dtype=np.float64)),
                    "original_nll": float(original_nll[index].sum(dtype=np.float64)),
                    "num_same_top1": int((window.top1 == original_top1[index]).sum()),
                    "num_same_top5": num_shared(window.top5, original_top5[index]),
                    "num_kl_positions": len(kl),
                    "kl_sum": float(kl.sum()),
                }
            )
        prompts = greedy_prompts(evaluation, options)
        matching = num_matching(continue_greedily(session, prompts, options.greedy_tokens), original_greedy)
        for row, count in zip(rows, matching, strict=False):  # windows beyond the prompts have none
            row["greedy_tokens"], row["num_greedy_matching"] = options.greedy_tokens, int(count)
    finally:
        session.close()
    items = pd.DataFrame(rows)
    items.to_parquet(out / "items.parquet", index=False)
    return summarize(items, seed=options.seed)


def summarize(items: Any, *, seed: int, confidence: float = CONFIDENCE) -> QualitySummary:
    """The summary of `items.parquet`, a pandas DataFrame with one row per window.

    Args:
        items: of one measurement, or those of several on different windows.
        seed: of the bootstrap.
        confidence: of the intervals.
    """
    column = {name: items[name].to_numpy() for name in items.columns}
    documents, num_tokens, num_bytes = column["document"], column["num_tokens"], column["num_bytes"]
    nll, original_nll = column["nll"], column["original_nll"]
    how: dict[str, Any] = {"seed": seed, "confidence": confidence}
    bits, original_bits = nll / math.log(2), original_nll / math.log(2)
    return QualitySummary(
        perplexity=bootstrap_ratio_of_sums(nll, num_tokens, documents, transform=np.exp, **how),
        perplexity_increase=bootstrap_difference_of_ratios(
            nll, original_nll, num_tokens, documents, transform=np.exp, **how
        ),
        perplexity_increase_percent=paired_increase_percent(nll, original_nll, num_tokens, documents, **how),
        original_perplexity=math.exp(original_nll.sum() / num_tokens.sum()),
        bits_per_byte=bootstrap_ratio_of_sums(bits, num_bytes, documents, **how),
        bits_per_byte_increase=bootstrap_ratio_of_sums(bits - original_bits, num_bytes, documents, **how),
        original_bits_per_byte=float(original_bits.sum() / num_bytes.sum()),
        top1_agreement=bootstrap_ratio_of_sums(column["num_same_top1"], num_tokens, documents, **how),
        top5_agreement=bootstrap_ratio_of_sums(column["num_same_top5"], TOP * num_tokens, documents, **how),
        kl_nats=_mean_kl(column, **how),
        greedy_match_tokens=_mean_greedy_match(column, **how),
        greedy_tokens=int(np.nan_to_num(column["greedy_tokens"]).max()) if "greedy_tokens" in column else 0,
        window=int(num_tokens[0]) + 1,
        num_windows=len(items),
        num_documents=len(np.unique(documents)),
        num_tokens=int(num_tokens.sum()),
        num_kl_positions=int(column["num_kl_positions"].sum()),
    )


def measured(summary: QualitySummary) -> dict[str, Measured]:
    """What a summary says of each metric."""
    increase, bits = summary.bits_per_byte_increase, summary.original_bits_per_byte
    return {
        "perplexity": Measured(
            value=summary.perplexity,
            original=summary.original_perplexity,
            degradation=summary.perplexity_increase,
            degradation_percent=summary.perplexity_increase_percent,
        ),
        "bits_per_byte": Measured(
            value=summary.bits_per_byte,
            original=bits,
            degradation=increase,
            degradation_percent=scaled(increase, 100 / bits),
        ),
        "top1_agreement": Measured(value=summary.top1_agreement),
        "top5_agreement": Measured(value=summary.top5_agreement),
        "kl_nats": Measured(value=summary.kl_nats),
        **(
            {"greedy_match_tokens": Measured(value=summary.greedy_match_tokens)}
            if summary.greedy_match_tokens is not None
            else {}
        ),
    }


def _mean_kl(column: dict[str, Any], **how: Any) -> Estimate:
    """Mean KL over positions; documents where no position was drawn have no say."""
    drawn = column["num_kl_positions"] > 0
    return bootstrap_ratio_of_sums(
        column["kl_sum"][drawn], column["num_kl_positions"][drawn], column["document"][drawn], **how
    )


def _mean_greedy_match(column: dict[str, Any], **how: Any) -> Estimate | None:
    """Mean over prompts; None where none was continued."""
    if "num_greedy_matching" not in column:
        return None
    asked = np.nan_to_num(column["greedy_tokens"]) > 0
    matching = column["num_greedy_matching"][asked]
    if not len(matching):
        return None
    return bootstrap_ratio_of_sums(matching, np.ones(len(matching)), column["document"][asked], **how)


def greedy_prompts(evaluation: Evaluation, options: Quality) -> NDArray[np.int32]:
    """[N, length] int32: beginnings of evaluation windows; N is 0 where nothing is to be written."""
    num_prompts = options.num_greedy_prompts if options.greedy_tokens else 0
    return evaluation.tokens[:num_prompts, : options.greedy_prompt_tokens]


def num_shared(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """How many tokens of the rows of `second` [positions, k] are in the same row of `first` [positions, k]."""
    return int((first[:, None, :] == second[:, :, None]).any(axis=2).sum())


def bits_per_byte(nll: NDArray[np.float64], evaluation: Evaluation, *, seed: int) -> Estimate:
    """Bits to encode one byte of the text: perplexity that does not depend on the tokenizer.

    Args:
        nll: [num_windows] nats.
        evaluation: the windows that were predicted.
        seed: of the bootstrap.
    """
    return bootstrap_ratio_of_sums(nll / math.log(2), evaluation.num_bytes, evaluation.documents, seed=seed)


def kl_divergence(log_p: NDArray[np.float32], log_q: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(p ‖ q) in nats of each row, summed over the vocabulary in float64.

    Args:
        log_p: [positions, vocab_size], natural logarithms of p.
        log_q: [positions, vocab_size].
    """
    log_p64, log_q64 = log_p.astype(np.float64), log_q.astype(np.float64)
    return np.asarray((np.exp(log_p64) * (log_p64 - log_q64)).sum(axis=-1), np.float64)


def score_window(logits: NDArray[np.float32], targets: NDArray[np.int32], positions: NDArray[np.int64]) -> WindowScores:
    """Losses, likeliest tokens, and whole log-probabilities at `positions`, from the logits of one window.

    Args:
        logits: [W - 1, vocab_size], of the positions that predict `targets`.
        targets: [W - 1].
        positions: [k] int64, ascending, in 0..W - 2.

    Raises:
        ValueError: a logit is not finite.
    """
    import torch

    nll = np.empty(len(targets), np.float32)
    top1 = np.empty(len(targets), np.int32)
    top5 = np.empty((len(targets), TOP), np.int32)
    log_probabilities = []
    for start in range(0, len(targets), ROWS_PER_CHUNK):
        rows = slice(start, min(start + ROWS_PER_CHUNK, len(targets)))
        chunk = torch.from_numpy(np.ascontiguousarray(logits[rows]))
        best = likeliest(chunk, TOP)
        largest = chunk.gather(1, best[:, :1])
        normalizer = torch.sub(chunk, largest).exp_().sum(dim=-1).log_() + largest[:, 0]
        if not bool(torch.isfinite(normalizer).all()):
            raise ValueError("logits must be finite; got NaN or infinity")
        at_target = chunk.gather(1, torch.from_numpy(targets[rows].astype(np.int64))[:, None])[:, 0]
        nll[rows] = (normalizer - at_target).numpy()
        top1[rows], top5[rows] = best[:, 0].numpy(), best.numpy()
        wanted = positions[(positions >= rows.start) & (positions < rows.stop)] - start
        log_probabilities.append((chunk[wanted] - normalizer[wanted, None]).numpy())
    return WindowScores(nll=nll, top1=top1, top5=top5, log_probabilities=np.concatenate(log_probabilities))


def likeliest(logits: "torch.Tensor", num: int) -> "torch.Tensor":
    """[positions, num] int64: the tokens with the largest logits, the largest first.

    A vocabulary is searched by groups: the `num` largest lie in the `num` groups with the largest maxima. Of 49 152
    tokens that takes a quarter of topk's time.

    Args:
        logits: [positions, vocab_size].
        num: at most vocab_size.
    """
    import torch

    num_groups = logits.shape[1] // GROUP
    if num_groups < num:
        return logits.topk(num, dim=-1).indices
    grouped = logits[:, : num_groups * GROUP].view(-1, num_groups, GROUP)
    groups = grouped.amax(dim=-1).topk(num, dim=-1).indices
    inside = (groups[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    rest = torch.arange(num_groups * GROUP, logits.shape[1]).expand(len(logits), -1)
    candidates = torch.cat([inside, rest], dim=1)
    return candidates.gather(1, logits.gather(1, candidates).topk(num, dim=-1).indices)


def _scores(
    session: "Session",
    evaluation: Evaluation,
    positions: NDArray[np.int64],
    *,
    name: str,
    report: Report,
) -> Iterator[WindowScores]:
    """Scores of every window in turn; the logits of one are held at a time."""
    num_windows, window = evaluation.tokens.shape
    if session.max_length < window:
        raise ValueError(
            f"{name} reads at most {session.max_length} tokens; evaluation windows have {window}. "
            f"Set data.evaluation_window to {session.max_length} or less."
        )
    if evaluation.tokens.max() >= session.vocab_size:
        raise ValueError(
            f"Evaluation tokens must lie in the vocabulary of {session.vocab_size}; got {evaluation.tokens.max()}. "
            "Prepare the data with this model's tokenizer."
        )
    total_nll = 0.0
    for index, tokens in enumerate(evaluation.tokens):
        logits = session.prefill(tokens[None].astype(np.int64), num_logits=window)[0]
        try:
            with _one_thread():
                scores = score_window(logits[:-1], tokens[1:], positions[positions[:, 0] == index, 1])
        except ValueError as error:
            raise ValueError(
                f"{name} cannot be scored in window {index}: {error}. Its weights or its precision are broken."
            ) from None
        total_nll += float(scores.nll.sum(dtype=np.float64))
        report(index + 1, num_windows, {"perplexity": math.exp(min(total_nll / ((index + 1) * (window - 1)), 700))})
        yield scores


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, PyTorch uses one thread: an engine's spin for a while after their work, and two of ours would wait."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def num_kl_positions(options: Quality, vocab_size: int) -> int:
    """How many positions are compared: as asked, or what fits in `MAX_REFERENCE_BYTES`."""
    return max(1, min(options.num_kl_positions, MAX_REFERENCE_BYTES // (4 * vocab_size)))


def sample_positions(shape: tuple[int, ...], num_positions: int, *, seed: int) -> NDArray[np.int64]:
    """[K, 2] int64 pairs (window, position) without repetition, ascending; K is `num_positions` or all there are.

    Args:
        shape: (num_windows, window); positions 0..window - 2 predict a token.
    """
    num_windows, window = shape
    total = num_windows * (window - 1)
    drawn = np.random.default_rng(seed).choice(total, size=min(num_positions, total), replace=False)
    drawn.sort()
    return np.stack(np.divmod(drawn, window - 1), axis=1).astype(np.int64)


def load_evaluation(data: Path) -> Evaluation:
    """The evaluation windows of a data directory that `prepare_data` wrote."""
    from tasks.calibration.tokens import load_record, load_tokens

    tokens = load_tokens(data, "evaluation")
    record = load_record(data)
    return Evaluation(
        tokens=tokens,
        documents=np.load(data / "evaluation_documents.npy"),
        num_bytes=np.asarray(record["evaluation_bytes_per_window"], np.int64),
        sha256=record["roles"]["evaluation"]["sha256"],
    )
