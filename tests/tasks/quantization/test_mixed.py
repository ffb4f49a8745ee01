import itertools

import pytest
import torch
from pydantic import ValidationError

from tasks.quantization import Gptq, Grid, RoundToNearest
from tasks.quantization.mixed import Mixed, Score, allocate, counts, possible_grids, size_bits
from tasks.quantization.rtn import round_to_nearest
from tasks.quantization.token_times import TimedChoice, TokenTimes, part_times

INT3, INT4, INT8 = Grid(bits=3, group_size=16), Grid(bits=4, group_size=16), Grid()


def score(name, grid, kl, num_weights=1024):
    size = size_bits(grid, (num_weights // 32, 32))
    return Score(layers=(name,), num_weights=num_weights, grid=grid, size_bits=size, kl=kl)


def random_scores(num_parts, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in range(num_parts):
        kl = sorted(torch.rand(3, generator=generator).tolist(), reverse=True)
        num_weights = 32 * int(torch.randint(1, 20, (), generator=generator))
        found += [score(f"p{part}", grid, k, num_weights) for grid, k in zip((INT3, INT4, INT8), kl, strict=True)]
    return found


def every_choice(scores):
    parts = [list(group) for _, group in itertools.groupby(scores, key=lambda score: score.layers)]
    return itertools.product(*parts)


def bits(choice):
    return sum(s.size_bits for s in choice) / sum(s.num_weights for s in choice)


def test_the_part_that_minds_most_gets_the_bits():
    scores = [
        score(n, g, k) for n, a, b in (("calm", 0.1, 0.01), ("shy", 0.9, 0.02)) for g, k in ((INT4, a), (INT8, b))
    ]
    found = allocate(scores, Mixed(choices=(INT4, INT8), bits_per_weight=7))
    assert found.grids == {"calm": INT4, "shy": INT8}
    assert found.predicted_kl == pytest.approx(0.12)
    assert found.bits_per_weight == pytest.approx((5 + 8.5) / 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [4.2, 5.0, 7.3])
def test_no_choice_within_the_budget_diverges_less(seed, budget):
    scores = random_scores(6, seed)
    found = allocate(scores, Mixed(choices=(INT3, INT4, INT8), bits_per_weight=budget))
    best = min(sum(s.kl for s in choice) for choice in every_choice(scores) if bits(choice) <= budget)
    assert found.bits_per_weight <= budget + 1e-9
    assert found.predicted_kl == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_within_the_divergence_is_smaller(seed):
    scores = random_scores(6, seed)
    found = allocate(scores, Mixed(choices=(INT3, INT4, INT8), max_kl=3))
    smallest = min(bits(choice) for choice in every_choice(scores) if sum(s.kl for s in choice) <= 3)
    assert found.predicted_kl <= 3 + 1e-9
    assert found.bits_per_weight == pytest.approx(smallest, rel=1e-3)


def test_a_size_budget_is_the_same_as_its_bits():
    scores = random_scores(6, 0)
    by_bits = allocate(scores, Mixed(choices=(INT3, INT4, INT8), bits_per_weight=5))
    again = allocate(scores, Mixed(choices=(INT3, INT4, INT8), size_mib=by_bits.size_mib * (1 + 1e-9)))
    assert again.predicted_kl == pytest.approx(by_bits.predicted_kl)


def token_times(*, blocks, tables):
    """Times of `blocks` and `tables` by grid, with an embedding called p0."""
    return TokenTimes(
        engine="onnxruntime",
        blocks=tuple(TimedChoice(grid=grid, tpot_ms=ms) for grid, ms in blocks.items()),
        tables=tuple(TimedChoice(grid=grid, tpot_ms=ms) for grid, ms in tables.items()),
        embedding="p0",
        prompt_tokens=8,
        new_tokens=8,
        num_blocks=3,
        threads=2,
        versions={},
        processor="",
        notes=[],
    )


TIMES = token_times(blocks={INT3: 10.0, INT4: 9.0, INT8: 14.0}, tables={INT3: 10.0, INT4: 11.5, INT8: 13.0})


def tpot_ms(choice):
    """The definition: that of the first choices, and each part's share of what its kind gains or loses."""
    total = 10.0
    num_block_weights = sum(s.num_weights for s in choice[1:])
    for part in choice:
        kind, whole = (TIMES.tables, part.num_weights) if part.layers == ("p0",) else (TIMES.blocks, num_block_weights)
        (measured,) = (timed.tpot_ms for timed in kind if timed.grid == part.grid)
        total += part.num_weights / whole * (measured - 10.0)
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [9.1, 11.3, 14.0])
def test_no_choice_within_the_time_diverges_less(seed, budget):
    scores = random_scores(6, seed)
    found = allocate(scores, Mixed(choices=(INT3, INT4, INT8), tpot_ms=budget), times=TIMES)
    within = [choice for choice in every_choice(scores) if tpot_ms(choice) <= budget]
    assert 0 < len(within) < 3**6
    assert found.predicted_tpot_ms <= budget * (1 + 1e-6)
    assert found.predicted_kl == pytest.approx(min(sum(s.kl for s in choice) for choice in within), rel=1e-3)
    (chosen,) = (c for c in within if all(found.grids[s.layers[0]] == s.grid for s in c))
    assert found.predicted_tpot_ms == pytest.approx(tpot_ms(chosen))


def test_parts_that_are_all_on_one_choice_take_what_was_measured():
    scores = random_scores(6, 0)
    milliseconds = part_times(scores, TIMES)
    for place, measured in enumerate((10.0, 9.0, 14.0)):
        assert milliseconds[[0, *range(3 + place, len(scores), 3)]].sum() == pytest.approx(measured)
    for place, measured in enumerate((10.0, 11.5, 13.0)):
        assert milliseconds[[place, *range(3, len(scores), 3)]].sum() == pytest.approx(measured)


def test_time_is_predicted_for_other_budgets_where_it_was_measured():
    scores, options = random_scores(6, 0), Mixed(choices=(INT3, INT4, INT8), bits_per_weight=4.001)
    assert allocate(scores, options).predicted_tpot_ms is None
    assert allocate(scores, options, times=TIMES).predicted_tpot_ms == pytest.approx(10.0)


def test_a_time_that_no_choice_keeps_is_refused_with_the_fastest():
    with pytest.raises(ValueError, match=r"comes to 9 ms per token on onnxruntime \(2 threads\); tpot_ms is 8\.5"):
        allocate(random_scores(6, 0), Mixed(choices=(INT3, INT4, INT8), tpot_ms=8.5), times=TIMES)


def test_a_budget_below_the_smallest_choice_is_refused_with_both():
    with pytest.raises(ValueError, match=r"comes to 4 bits per weight .* the budget is 3\.5 "):
        allocate(random_scores(3, 0), Mixed(choices=(INT3, INT4), bits_per_weight=3.5))


def test_a_divergence_that_no_choice_reaches_is_refused():
    with pytest.raises(ValueError, match=r"max_kl is 0\.001 nats; the best of the choices already comes to 0\."):
        allocate(random_scores(3, 0), Mixed(choices=(INT3, INT4), max_kl=0.001))


@pytest.mark.parametrize(
    "grid",
    [
        INT8,
        INT3,
        Grid(bits=4, group_size=16, symmetric=False),
        Grid(bits=4, group_size=16, symmetric=False, zero_point="real"),
    ],
)
def test_sizes_are_those_of_the_quantized_weight(grid):
    weight = torch.randn(8, 48)
    assert size_bits(grid, (8, 48)) == round_to_nearest(weight, grid, "layer").size_bits


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"choices": [{}, {"bits": 4}]}, "size_mib, max_kl and tpot_ms; got none"),
        ({"choices": [{}, {"bits": 4}], "bits_per_weight": 5, "max_kl": 1}, "got bits_per_weight and max_kl"),
        ({"choices": [{}, {}], "bits_per_weight": 5}, "one is listed twice"),
        ({"choices": [{}], "bits_per_weight": 5}, "at least two choices"),
        (
            {
                "choices": [{}, {"bits": 4}],
                "embedding_choices": [{"symmetric": False, "zero_point": "real"}],
                "bits_per_weight": 5,
            },
            "must be integer",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, problem):
    with pytest.raises(ValidationError, match=problem):
        Mixed.model_validate(options)


def test_weights_are_one_grid_or_a_choice():
    one = RoundToNearest.model_validate({"weights": {"bits": 4}})
    mixed = Gptq.model_validate({"weights": {"choices": [{"bits": 4}, {"bits": 8}], "bits_per_weight": 5}})
    assert one.weights == Grid(bits=4)
    assert possible_grids(one.weights, None) == (Grid(bits=4),)
    assert possible_grids(mixed.weights, mixed.embeddings) == (Grid(bits=4), Grid(), Grid())
    assert Gptq.model_validate(mixed.model_dump(mode="json")) == mixed


def test_embeddings_have_one_place_in_the_options():
    mixed = {"choices": [{"bits": 4}, {"bits": 8}], "embedding_choices": [{"bits": 8}], "bits_per_weight": 5}
    with pytest.raises(ValidationError, match="drop them, or `embeddings`"):
        Gptq.model_validate({"weights": mixed, "embeddings": None})


def test_grids_are_counted_for_people():
    assert counts({"a": INT8, "b": INT4, "c": INT4}) == "2 of 4 bits in groups of 16, 1 of 8 bits"
