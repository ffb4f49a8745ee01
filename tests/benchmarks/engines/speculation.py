"""What a lookup or a draft gains, and what it costs where it does not suit: one bundle, plain and sped up, interleaved.

    .venv/bin/python -m tests.benchmarks.engines.speculation BUNDLE [--draft BUNDLE] [--threads 2] [--rounds 5]

Three kinds of texts out of the standard library's: `repeats` asks for a function that the prompt holds already, so that
most of the answer can be looked up; `prose` goes on from text, always with the likeliest token, which ends in circles
with small models; `sampled` goes on from the same at temperature 1, where hardly anything repeats. Every round has new
prompts, so that nothing is kept from the round before. The table gives ratios of the whole answer's time per
token, plain over sped up, medians over rounds and prompts with 95 % intervals. OpenVINO GenAI, which answers without
proposals, samples by other random numbers than the session that checks them; the sampled texts are then not the same.
"""

import argparse
import inspect
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.engines.compiling import load_generator
from tasks.engines.proposals import Lookup
from tasks.engines.text import Sampling
from tasks.validation.statistics import median

FUNCTIONS = (textwrap.shorten, textwrap.fill, textwrap.indent, statistics.median_low, statistics.fmean)
MODULES = (argparse, inspect, statistics, textwrap, time)


def prompts(kind: str, number: int) -> list[str]:
    """The texts of one round."""
    begin = f"# Number {number}\n"
    if kind == "repeats":
        sources = [inspect.getsource(function) for function in FUNCTIONS]
        return [f"{begin}{text}\n# The same function once more, unchanged:\n{_first_line(text)}" for text in sources]
    return [begin + str(inspect.getdoc(module)).split("\n\n")[0] for module in MODULES]


def _first_line(text: str) -> str:
    return text.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    options: dict[str, dict[str, Any]] = {"plain": {}, "lookup": {"lookup": Lookup()}}
    if arguments.draft:
        options["draft"] = {"draft": arguments.draft}
    loaded = {
        name: load_generator(arguments.bundle, threads=arguments.threads, **chosen) for name, chosen in options.items()
    }
    rng = np.random.default_rng(0)  # who answers first
    columns = "text | proposals | time, plain / sped up | tokens per pass | accepted of proposed | same answers"
    lines = [f"| {columns} |", "|---|---|---|---|---|---|"]
    for kind in ("repeats", "prose", "sampled"):
        token_s: dict[str, list[float]] = {name: [] for name in loaded}
        tokens: dict[str, list[tuple[int, ...]]] = {name: [] for name in loaded}
        passes, accepted, proposed = (dict.fromkeys(loaded, 0) for _ in range(3))
        for number in range(arguments.rounds + 1):
            sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=float(kind == "sampled"), seed=number)
            for text in prompts(kind, number):
                for name, generator in rng.permutation(np.array(list(loaded.items()), dtype=object)):
                    started_at = time.perf_counter()
                    (answer,), work = generator.answer([generator.encode(text)], sampling)
                    if number:  # the first round warms up
                        token_s[name].append((time.perf_counter() - started_at) / len(answer.tokens))
                        tokens[name].append(answer.tokens)
                        passes[name] += work.num_steps + 1
                        accepted[name] += work.num_accepted or 0
                        proposed[name] += work.num_proposed or 0
        for name in loaded:
            if name != "plain":
                ratios = np.array(token_s["plain"]) / np.array(token_s[name])
                found = median(ratios[:, None], seed=0)
                written = sum(len(each) for each in tokens[name])
                same = sum(a == b for a, b in zip(tokens["plain"], tokens[name], strict=True))
                lines.append(
                    f"| {kind} | {name} | {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] | "
                    f"{written / passes[name]:.2f} | {accepted[name]} of {proposed[name]} | {same} of {len(ratios)} |"
                )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
