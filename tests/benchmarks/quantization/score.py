"""Scores contenders: perplexity, KL from the float model and top-1 agreement with it, on the same evaluation windows.

One transformers model in float32, whose weights are replaced by each contender's; so every row is computed by the same
code, and rows differ by weights alone. Scores are kept beside a contender and reused while its weights are the same.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tasks.calibration.tokens import load_tokens

ROWS_AT_ONCE = 8
"""Positions compared at once: their log-probabilities stay in a core's cache."""

logger = logging.getLogger("benchmark")


class Reference:
    """The float model's log-probabilities on all windows, and its perplexity.

    As float16 (1.4 GB of 28 windows of 512 tokens): a likely token's is off by less than 0.0005, with either sign, and
    a mean over thousands of positions by much less.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.tokens = tokens
        self._log_probs: list[Tensor] = []
        self._likeliest: list[Tensor] = []
        nll = 0.0
        for window, logits in zip(tokens, _logits(model, tokens), strict=True):
            log_probs = logits.log_softmax(1)
            self._log_probs.append(log_probs.half())
            self._likeliest.append(log_probs.argmax(1))
            nll -= float(log_probs.gather(1, window[1:, None]).double().sum())
        self.perplexity = math.exp(nll / tokens[:, 1:].numel())

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """The figures of one contender: weights that `model` holds now.

        perplexity: exp of the mean negative log-likelihood, in nats, of all tokens but each window's first;
        kl_nats: mean over the same positions of KL(float || contender);
        top1_agreement: fraction of them where both find the same token likeliest.
        """
        nll = kl = agreed = 0.0
        for index, logits in enumerate(_logits(model, self.tokens)):
            compared = logits, self.tokens[index, 1:], self._log_probs[index], self._likeliest[index]
            rows = zip(*(torch.split(values, ROWS_AT_ONCE) for values in compared), strict=True)
            for logits_here, labels, stored, likeliest in rows:
                log_probs, expected = logits_here.log_softmax(1), stored.float()
                nll -= float(log_probs.gather(1, labels[:, None]).double().sum())
                kl += float((expected.exp() * (expected - log_probs)).sum(1).double().sum())
                agreed += int((likeliest == log_probs.argmax(1)).sum())
        num_predicted = self.tokens[:, 1:].numel()
        return {
            "perplexity": math.exp(nll / num_predicted),
            "kl_nats": kl / num_predicted,
            "top1_agreement": agreed / num_predicted,
        }


def _logits(model: PreTrainedModel, tokens: Tensor) -> Iterator[Tensor]:
    """[length - 1, vocab_size] float32 of each window."""
    for window in tokens:
        with torch.inference_mode():
            yield model(window[None, :-1]).logits[0]


def load_weights_(model: PreTrainedModel, contender: Path) -> None:
    """Replaces every weight of `model`, in place."""
    parameters = dict(model.named_parameters())  # tied ones once
    with safe_open(contender / "model.safetensors", framework="pt") as file, torch.no_grad():
        missing = parameters.keys() - set(file.keys())
        if missing:
            raise ValueError(f"{contender} must hold every weight; {sorted(missing)[:5]} are missing. Make it again.")
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))


def score_all(checkpoint: Path, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Records and scores of all contenders in `folder`, and float's; sorted by bits per weight."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = torch.from_numpy(load_tokens(data, "evaluation")).long()
    contenders = sorted(path.parent for path in folder.glob("*/contender.json"))
    reference: Reference | None = None
    for contender in contenders:
        if _is_scored(contender):
            continue
        if reference is None:
            reference = Reference(model, tokens)
            if not (folder / "float.json").exists():
                scores = {"perplexity": reference.perplexity, "kl_nats": 0.0, "top1_agreement": 1.0}
                (folder / "float.json").write_text(json.dumps(scores) + "\n")
        load_weights_(model, contender)
        (contender / "score.json").write_text(json.dumps(reference.score(model)) + "\n")
        logger.info("%s: %s", contender.name, (contender / "score.json").read_text().strip())
    rows = [
        json.loads((contender / "contender.json").read_text()) | json.loads((contender / "score.json").read_text())
        for contender in contenders
    ]
    float_scores = json.loads((folder / "float.json").read_text())
    rows.append({"name": "float32", "tool": "float", "bits_per_weight": 32.0, "calibration": None, **float_scores})
    for row in rows:
        row["change_percent"] = 100 * (row["perplexity"] / float_scores["perplexity"] - 1)
    return sorted(rows, key=lambda row: (row["bits_per_weight"], row["perplexity"]))


def _is_scored(contender: Path) -> bool:
    scores = contender / "score.json"
    return scores.exists() and scores.stat().st_mtime >= (contender / "contender.json").stat().st_mtime


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    lines = [
        "| contender | bits per weight | perplexity | change % | KL nats | top-1 % | calibration | s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        used = row["calibration"]
        calibration = f"{used['sequences']} x {used['length']}" if used else ""
        cost = f"{row['elapsed_s']:.0f} | {row['peak_rss_mib']:.0f}" if "elapsed_s" in row else " | "
        lines.append(
            f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['perplexity']:.3f} | {row['change_percent']:.2f} | "
            f"{row['kl_nats']:.4f} | {100 * row['top1_agreement']:.1f} | {calibration} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--contenders", type=Path, required=True, help="Directory of contenders; also for the results.")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    rows = score_all(arguments.checkpoint, arguments.data, arguments.contenders)
    (arguments.contenders / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.contenders / "results.md").write_text(table(rows))


if __name__ == "__main__":
    main()
