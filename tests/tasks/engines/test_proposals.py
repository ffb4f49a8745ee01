"""Proposed tokens: which they are, that they change nothing, and when none are made."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tasks.engines.generation import Ids, Logits
from tasks.engines.proposals import DraftProposer, Lookup, LookupProposer, Pace, ProposingRuntime
from tasks.engines.runtimes import SessionRuntime
from tasks.engines.text import Sampling, Work

VOCAB_SIZE = 30


class Chain:
    """A session whose next token's logits depend on the last token alone, by rows of a table; counts its passes."""

    vocab_size = VOCAB_SIZE
    max_length = 200
    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, table: Logits) -> None:
        self.held: list[int] = []
        self.passes: list[int] = []
        self._table = table

    def prefill(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        self.held = []
        return self.append(input_ids, num_logits)

    def decode(self, input_ids: Ids) -> Logits:
        return self.append(input_ids[:, None])[:, 0]

    def append(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        assert len(input_ids) == 1
        self.held += input_ids[0].tolist()
        self.passes.append(input_ids.shape[1])
        return self._table[input_ids[:, -num_logits:]]

    def rewind(self, length: int) -> None:
        assert length <= len(self.held)
        del self.held[length:]

    def close(self) -> None: ...


def successors(next_tokens: Callable[[int], int]) -> Logits:
    """The table of a chain that goes from token t to next_tokens(t)."""
    table = np.zeros((VOCAB_SIZE, VOCAB_SIZE), np.float32)
    for token in range(VOCAB_SIZE):
        table[token, next_tokens(token) % VOCAB_SIZE] = 5.0
    return table


COUNTING = successors(lambda token: token + 1)


class Always(Pace):
    """Never pauses."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.took_plain(1.0)

    def width(self) -> int:
        return self._most


def written(runtime: SessionRuntime | ProposingRuntime, prompts: list[list[int]], **options: float) -> list[list[int]]:
    tokens, _ = written_with_work(runtime, prompts, **options)
    return tokens


def written_with_work(
    runtime: SessionRuntime | ProposingRuntime, prompts: list[list[int]], eos: Sequence[int] = (), **options: float
) -> tuple[list[list[int]], Work]:
    tokens: list[list[int]] = [[] for _ in prompts]

    def on_token(index: int, token: int) -> bool:
        tokens[index].append(token)
        return False

    work = runtime.generate(prompts, Sampling.model_validate(options), frozenset(eos), on_token)
    return tokens, work


def looked_up(tokens: list[int], most: int, **options: int) -> list[int]:
    proposer = LookupProposer(Lookup(**options))
    proposer.read(tokens)
    return proposer.propose(tokens, most)


def test_a_lookup_proposes_what_followed_the_last_tokens_earlier() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2, 3], 2) == [4, 5]


def test_of_several_occurrences_the_last_counts_and_longer_ones_come_first() -> None:
    assert looked_up([1, 2, 7, 0, 1, 2, 8, 0, 1, 2], 1) == [8]
    assert looked_up([5, 1, 2, 7, 0, 6, 1, 2, 8, 0, 5, 1, 2], 1) == [7]


def test_what_follows_the_end_of_the_text_is_what_was_just_proposed() -> None:
    assert looked_up([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_one_token_alone_is_looked_up_only_if_asked_for() -> None:
    assert looked_up([1, 4, 0, 1], 1) == []
    assert looked_up([1, 4, 0, 1], 1, max_ngram_size=1) == [4]


def test_another_text_is_no_part_of_what_is_looked_up() -> None:
    proposer = LookupProposer(Lookup())
    proposer.read([1, 2, 3, 4, 1, 2])
    proposer.read([9, 9, 8, 1, 2])
    assert proposer.propose([9, 9, 8, 1, 2], 1) == []


def test_a_draft_proposes_what_it_would_write_and_reads_nothing_twice() -> None:
    session = Chain(COUNTING)
    draft = DraftProposer(session)
    prompt = list(range(10))
    draft.read(prompt)
    assert draft.propose(prompt, 3) == [10, 11, 12]
    assert session.passes == [9, 1, 1, 1]

    other = [*prompt, 10, 20]  # the model took one of them
    draft.read(other)
    assert draft.propose(other, 2) == [21, 22]
    assert session.passes[4:] == [1, 1]
    assert session.held == [*other, 21]


def test_a_draft_proposes_no_more_than_it_can_read() -> None:
    session = Chain(COUNTING)
    session.max_length = 12
    draft = DraftProposer(session)
    for length, expected in ((10, 3), (12, 1), (13, 0), (20, 0)):
        tokens = list(range(length))
        draft.read(tokens)
        assert len(draft.propose(tokens, 5)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_are_those_without_proposals_and_take_fewer_passes(temperature) -> None:
    """A random table under the draft's: they agree on some tokens, and greedy texts run into circles to look up."""
    rng = np.random.default_rng(3)
    table = rng.normal(0, 3, (VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)
    draft_table = table + rng.normal(0, 1, table.shape).astype(np.float32)
    prompts, options = [[1, 2, 3], [4]], {"max_new_tokens": 50, "temperature": temperature, "seed": 5}
    expected = written(SessionRuntime(Chain(table)), prompts, **options)

    for proposer in (LookupProposer(Lookup()), DraftProposer(Chain(draft_table))):
        session = Chain(table)
        runtime = ProposingRuntime(session, proposer, Always(4))
        found, work = written_with_work(runtime, prompts, **options)

        assert found == expected
        assert work.num_accepted is not None
        assert work.num_proposed is not None
        assert 0 < work.num_accepted <= work.num_proposed
        assert work.num_steps + work.num_accepted == 2 * 49
        assert len(session.passes) == work.num_steps + 2


def test_an_end_token_among_the_proposed_ends_the_text() -> None:
    runtime = ProposingRuntime(Chain(COUNTING), DraftProposer(Chain(COUNTING)), Always(4))
    assert written_with_work(runtime, [[1]], eos=[7], max_new_tokens=20)[0] == [[2, 3, 4, 5, 6, 7]]


def test_the_next_text_begins_anew() -> None:
    runtime = ProposingRuntime(Chain(COUNTING), DraftProposer(Chain(COUNTING)), Always(4))
    assert written(runtime, [[1], [1, 5]], max_new_tokens=6) == [[2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 10, 11]]


def test_nothing_is_proposed_until_it_is_known_what_that_costs() -> None:
    pace = Pace(5)
    assert pace.width() == 0
    pace.took_plain(1.0)
    assert pace.width() == 2


def test_accepted_proposals_grow_and_refused_ones_shrink() -> None:
    pace = Pace(5)
    pace.took_plain(1.0)
    widths = []
    for num_right in (2, 4, 5, 3, 0):
        widths.append(pace.width())
        pace.took_round(1.2, widths[-1], num_right)
    assert widths == [2, 4, 5, 5, 4]
    assert pace.width() == 2


@pytest.mark.parametrize("round_s", [1.1, 1.5, 3.0, 9.0])
def test_what_never_suits_costs_no_more_than_its_allowance(round_s) -> None:
    """Plain passes take 1 s: of a long text, 2 % at most and the credit of the beginning, whatever a refusal costs."""
    pace = Pace(5)
    plain = elapsed_s = 0.0
    for _ in range(5000):
        if width := pace.width():
            pace.took_round(round_s, width, 0)
            elapsed_s += round_s
        else:
            pace.took_plain(1.0)
            elapsed_s += 1.0
        plain += 1.0
    assert plain < elapsed_s < 1.02 * plain + pace.FIRST_CREDIT + round_s


def test_what_reading_takes_is_on_the_account() -> None:
    pace = Pace(5)
    pace.took_plain(1.0)
    pace.took_more(pace.FIRST_CREDIT + 0.5)
    assert pace.width() == 0
    for _ in range(math.ceil(0.5 / pace.ALLOWANCE)):
        pace.took_plain(1.0)
    assert pace.width() == 2


def test_what_suits_goes_on_and_its_savings_do_not_pay_for_ever() -> None:
    pace = Pace(4)
    pace.took_plain(1.0)
    for _ in range(100):
        pace.took_round(2.0, pace.width(), 3)
    num_refused = 0
    while width := pace.width():
        pace.took_round(2.0, width, 0)
        num_refused += 1
    assert num_refused <= pace.MOST_CREDIT + 1


def test_a_hiccup_is_no_reason_to_pause() -> None:
    pace = Pace(2)
    for _ in range(5):
        pace.took_plain(1.0)
        pace.took_round(1.2, 2, 1)
    pace.took_round(50.0, 2, 1)
    assert pace.width() == 2
