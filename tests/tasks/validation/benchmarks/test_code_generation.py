import itertools
import json

import pandas as pd
import pytest

from tasks.validation.benchmarks import CodeGeneration
from tasks.validation.benchmarks.code_generation import pass_at_k, program
from tasks.validation.benchmarks.items import Item, local_file
from tasks.validation.benchmarks.measuring import ask_original, measure_benchmark
from tasks.validation.benchmarks.sandbox import SandboxLimits, missing, run_program

LIMITS = SandboxLimits(cpu_s=3, wall_s=10)

confined = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def problems():
    benchmark = CodeGeneration(task="code_generation")
    return benchmark.items(local_file(benchmark.data))


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_program():
    for n, k in ((5, 1), (5, 2), (6, 3), (4, 4)):
        for c in range(n + 1):
            programs = [True] * c + [False] * (n - c)
            draws = list(itertools.combinations(programs, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="k of at most n programs; got n 1, c 0, k 10"):
        pass_at_k(1, 0, 10)


@confined
def test_reference_solutions_of_humaneval_pass_and_wrong_ones_do_not(problems):
    assert len(problems) == 164
    for problem in problems[::12]:
        assert run_program(program(problem, problem["canonical_solution"], chat=False), LIMITS).passed, problem
        assert not run_program(program(problem, "    return None\n", chat=False), LIMITS).passed, problem
        assert not run_program(program(problem, "    raise SystemExit(0)\n", chat=False), LIMITS).passed, problem


@confined
@pytest.mark.parametrize(
    "answer",
    [
        "Here it is:\n```python\n{whole}\n```\nIt works.",
        "```\n{whole}",
        "{solution}",
        "```python\n{solution}```",
        "{whole}",
    ],
)
def test_programs_are_found_in_chats(problems, answer):
    for problem in problems[10:40:15]:  # 10 has a helper before the function
        whole = (
            problem["prompt"][problem["prompt"].index(f"def {problem['entry_point']}") :]
            + problem["canonical_solution"]
        )
        text = answer.format(whole=whole, solution=problem["canonical_solution"])
        assert run_program(program(problem, text, chat=True), LIMITS).passed, problem


def test_samples_that_would_be_equal_are_refused_and_pass_at_10_needs_ten():
    with pytest.raises(ValueError, match="num_samples 10 with temperature 0"):
        CodeGeneration(task="code_generation", num_samples=10)
    names = {
        n: [m.name for m in CodeGeneration(task="code_generation", num_samples=n, temperature=0.8).measured_metrics()]
        for n in (1, 9, 10)
    }
    assert names == {1: ["*.pass_at_1"], 9: ["*.pass_at_1"], 10: ["*.pass_at_1", "*.pass_at_10"]}
    answers = {"num_passed": [0, 1, 10]}
    items = [Item(n, {}, n) for n in range(3)]
    ten = CodeGeneration(task="code_generation", num_samples=10, temperature=0.8)
    scores = ten.scores(items, answers, None)
    assert scores["pass_at_1"].value == pytest.approx((0 + 0.1 + 1) / 3)
    assert scores["pass_at_10"].value == pytest.approx(2 / 3)


@confined
def test_an_engine_writes_programs_that_are_run(tiny_checkpoint, tiny_bundle, write_lines, greedy, tmp_path):
    """One problem is right whatever is written, one never."""
    lines = [
        {
            "prompt": "def f():\n    return 1\n\n'''",
            "entry_point": "f",
            "test": "'''\ndef check(f):\n    assert f() == 1",
        },
        {
            "prompt": "def f():\n    return 1\n\n'''",
            "entry_point": "f",
            "test": "'''\ndef check(f):\n    assert f() == 2",
        },
    ]
    file = write_lines(lines)
    benchmark = CodeGeneration(task="code_generation", data=str(file), max_new_tokens=4, limits=LIMITS)
    reference = tmp_path / "reference"
    reference.mkdir()
    original = ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=file, threads=1, out=reference)
    assert original.figures == {"pass_at_1": 0.5}
    summary = measure_benchmark(bundle=tiny_bundle, reference=reference, benchmark=benchmark, threads=1, out=tmp_path)
    assert summary.metrics["pass_at_1"].value.value == 0.5
    assert summary.metrics["pass_at_1"].degradation.high > 0.5  # of two problems
    items = pd.read_parquet(tmp_path / "items.parquet")
    assert list(items["outcome"]) == ["passed", "raised AssertionError:"]
    assert list(items["num_passed"]) == [1, 0]
    assert items["answer"][0] == greedy(json.loads(file.read_text().splitlines()[0])["prompt"], 4)


def test_without_a_sandbox_nothing_is_asked(tiny_checkpoint, write_lines, tmp_path, monkeypatch):
    file = write_lines([{"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}])
    monkeypatch.setattr("platform.system", lambda: "Plan 9")
    monkeypatch.setattr("platform.machine", lambda: "m68k")
    benchmark = CodeGeneration(task="code_generation", data=str(file))
    with pytest.raises(ValueError, match="only where it can be confined: Linux on x86_64 or aarch64; this is Plan 9"):
        ask_original(checkpoint=tiny_checkpoint, benchmark=benchmark, data=file, threads=1, out=tmp_path)
