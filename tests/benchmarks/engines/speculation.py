"""What a lookup or a draft gains, and what it costs where it does not suit: one bundle, plain and sped up, interleaved.

    .venv/bin/python -m tests.benchmarks.engines.speculation BUNDLE [--draft BUNDLE] [--threads 2] [--rounds 5]

Two kinds of prompts of the standard library's text: `repeats` asks for a function that the prompt holds already, so
that most of the answer can be looked up; `prose` goes on from text. Answers must be the same; the table gives ratios of
the whole answer's time, plain over sped up, median over rounds and prompts.
"""

import argparse
import inspect
import statistics
import sys
import textwrap
import time
from pathlib import Path

from tasks.engines.compiling import load_generator
from tasks.engines.proposals import Lookup
from tasks.engines.text import Sampling, TextGenerator


def prompts(generator: TextGenerator) -> dict[str, list[list[int]]]:
    """Token ids of each prompt, by kind."""
    repeats = [
        f"{inspect.getsource(function)}\n# The same function once more, unchanged:\n{_first_line(function)}"
        for function in (textwrap.shorten, textwrap.fill, textwrap.indent, statistics.median_low, statistics.fmean)
    ]
    prose = [str(inspect.getdoc(module)).split("\n\n")[0] for module in (argparse, inspect, statistics, textwrap, time)]
    return {
        "repeats": [generator.encode(text) for text in repeats],
        "prose": [generator.encode(text) for text in prose],
    }


def _first_line(function: object) -> str:
    return inspect.getsource(function).splitlines()[0]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    loaded = {"plain": load_generator(arguments.bundle, threads=arguments.threads)}
    loaded["lookup"] = load_generator(arguments.bundle, threads=arguments.threads, lookup=Lookup())
    if arguments.draft:
        loaded["draft"] = load_generator(arguments.bundle, threads=arguments.threads, draft=arguments.draft)
    sampling = Sampling(max_new_tokens=arguments.new_tokens)
    lines = ["| text | proposals | time, plain / sped up | tokens per pass | same answers |", "|---|---|---|---|---|"]
    for kind, texts in prompts(loaded["plain"]).items():
        seconds: dict[str, list[float]] = {name: [] for name in loaded}
        tokens: dict[str, list[tuple[int, ...]]] = {name: [] for name in loaded}
        passes = dict.fromkeys(loaded, 0)
        for number in range(arguments.rounds + 1):
            for text in texts:
                for name, generator in loaded.items():
                    started_at = time.perf_counter()
                    (answer,), work = generator.answer([text], sampling)
                    if number:  # the first round warms up
                        seconds[name].append(time.perf_counter() - started_at)
                        tokens[name].append(answer.tokens)
                        passes[name] += work.num_steps + 1
        for name in loaded:
            if name != "plain":
                ratios = [plain / fast for plain, fast in zip(seconds["plain"], seconds[name], strict=True)]
                written = sum(len(each) for each in tokens[name])
                same = sum(a == b for a, b in zip(tokens["plain"], tokens[name], strict=True))
                lines.append(
                    f"| {kind} | {name} | {statistics.median(ratios):.2f} | {written / passes[name]:.2f} | "
                    f"{same} of {len(ratios)} |"
                )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
