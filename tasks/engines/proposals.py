"""Lossless acceleration: tokens that a lookup or a draft proposes, which the model checks in one pass.

The model keeps the proposals that it would have written itself, so answers are what they are without, greedy or
sampled: every token is chosen from the model's own logits, by the same random numbers. (Where an engine rounds inputs,
it rounds those of several tokens otherwise than those of one: still the model's own choice, another where two tokens
are about as likely.) Whether proposing is worth its time is measured on the way, and where it is not, it pauses
(`Pace`).

Sources: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023, arXiv:2211.17192,
with a proposal taken when the model's own choice equals it, which needs no probabilities of the draft; Saxena, "Prompt
Lookup Decoding", 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from pydantic import BaseModel, Field

from tasks.engines.generation import Ids, Logits, Session, choose
from tasks.engines.text import OnToken, Sampling, Work

DRAFT_TOKENS = 5  # most that a draft proposes at once


class Lookup(BaseModel, frozen=True, extra="forbid"):
    """Prompt-lookup decoding: what followed the last tokens earlier in the text is proposed, and checked in one pass.

    "Prompt Lookup Decoding", Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    max_ngram_size: int = Field(3, ge=1, le=15, description="How many of the last tokens are looked up.")
    max_proposed: int = Field(5, ge=1, le=16, description="Most tokens proposed at once.")


class RewindableSession(Session, Protocol):
    """A session that can append several tokens to one sequence at once, and forget the last ones."""

    def append(self, input_ids: Ids, num_logits: int = 1) -> Logits:
        """Appends tokens [1, length] to the sequence: the last ones' logits [1, num_logits, vocab_size]."""

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""


class Proposer(Protocol):
    """What guesses how a text goes on."""

    def read(self, tokens: Sequence[int]) -> None:
        """Takes in a text, as far as that is work that its every new beginning needs once."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At least 1 and at most `most` tokens after the text that was read last; none: no guess."""

    def close(self) -> None:
        """Frees its memory."""


class LookupProposer:
    """What followed the last occurrence of a text's last tokens: of as many as possible, and of two at least."""

    def __init__(self, options: Lookup) -> None:
        self._sizes = range(options.max_ngram_size, min(2, options.max_ngram_size) - 1, -1)
        self._known: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place after the last occurrence of some tokens

    def read(self, tokens: Sequence[int]) -> None:
        """Notes the place after each run of tokens but the last ones, which nothing follows yet."""
        if self._known != tokens[: len(self._known)]:
            self._known, self._after = [], {}
        for end in range(max(len(self._known), 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._known = list(tokens)

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Proposer`; what follows the end of the text is what was just proposed."""
        keys = (tuple(tokens[-size:]) for size in self._sizes)
        place = next((self._after[key] for key in keys if key in self._after), None)
        if place is None:
            return []
        text = list(tokens)
        for index in range(place, place + most):
            text.append(text[index])
        return text[len(tokens) :]

    def close(self) -> None:
        """Nothing is held."""


class DraftProposer:
    """What a smaller model would write; it reads what it has not read yet, and only when it is asked."""

    def __init__(self, session: RewindableSession) -> None:
        self._session = session
        self._known: list[int] = []  # what its KV cache holds

    def read(self, tokens: Sequence[int]) -> None:
        """Reads what is new of a text but for the last token, if it is more than a pass with proposals leaves."""
        if len(tokens) <= self._session.max_length and len(tokens) - 1 - self._num_known(tokens) > DRAFT_TOKENS:
            self._append(tokens[:-1])

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Proposer`."""
        most = min(most, self._session.max_length - len(tokens) + 1)
        if most < 1:
            return []
        found = [int(self._append(tokens).argmax())]
        while len(found) < most:
            found.append(int(self._session.decode(np.array(found[-1:], np.int64))[0].argmax()))
        self._known = [*tokens, *found[:-1]]
        return found

    def _append(self, tokens: Sequence[int]) -> Logits:
        """[vocab_size] after a text."""
        known = self._num_known(tokens)
        rest = np.array([tokens[known:]], np.int64)
        if known:
            self._session.rewind(known)
            logits = self._session.append(rest)
        else:
            logits = self._session.prefill(rest)
        self._known = list(tokens)
        last: Logits = logits[0, -1]
        return last

    def _num_known(self, tokens: Sequence[int]) -> int:
        """How many of a text's first tokens need not be read again; the last one always is, for its logits."""
        pairs = enumerate(zip(self._known, tokens[:-1], strict=False))
        return next((index for index, (a, b) in pairs if a != b), min(len(self._known), len(tokens) - 1))

    def close(self) -> None:
        """Frees the draft."""
        self._session.close()


class Pace:
    """Whether to propose, and how many tokens: an account of the time that proposing saved.

    A pass with proposals earns the time that its tokens would have taken without, and pays its own. Passes without add
    `ALLOWANCE` of their time. While the account is not overdrawn, tokens are proposed. So text that does not suit is
    slowed down by `ALLOWANCE` and the `FIRST_CREDIT` of a model just loaded, whatever the processor, the draft and the
    text; and text that suits again is noticed after a few tokens.

    Times are medians of the last passes of the same kind: a hiccup of the machine is no reason to change.
    """

    ALLOWANCE = 0.02
    FIRST_CREDIT = 2.0  # in passes without proposals, as all of the account
    MOST_CREDIT = 4.0
    LEAST = 2  # tokens proposed at once

    def __init__(self, most: int) -> None:
        """Start with few proposals at a time; `most` are allowed."""
        self._most = most
        self._width = min(self.LEAST, most)
        self._plain_s: deque[float] = deque(maxlen=15)
        self._round_s: dict[int, deque[float]] = {}
        self._credit = self.FIRST_CREDIT

    def width(self) -> int:
        """How many tokens to propose for the next pass; 0: none."""
        if not self._plain_s:  # what a pass takes without is not known yet
            return 0
        return self._width if self._credit >= 0 else 0

    def took_plain(self, elapsed_s: float) -> None:
        """Notes a pass without proposals."""
        self._plain_s.append(elapsed_s)
        self._earn(self.ALLOWANCE)

    def took_more(self, elapsed_s: float) -> None:
        """Notes what a proposer took to read."""
        self._earn(-elapsed_s / statistics.median(self._plain_s))

    def took_round(self, elapsed_s: float, num_proposed: int, num_accepted: int) -> None:
        """Notes a pass with proposals, of which the first `num_accepted` were right; and what making them took."""
        of_kind = self._round_s.setdefault(num_proposed, deque(maxlen=5))
        of_kind.append(elapsed_s)
        self._earn(num_accepted + 1 - statistics.median(of_kind) / statistics.median(self._plain_s))
        if num_accepted < num_proposed:
            self._width = max(num_accepted + 1, min(self.LEAST, self._most))
        elif num_proposed == self._width:
            self._width = min(2 * self._width, self._most)

    def _earn(self, passes: float) -> None:
        self._credit = min(self._credit + passes, self.MOST_CREDIT)


class ProposingRuntime:
    """A session whose passes check what a proposer guesses: one prompt after the other, see `text.Runtime`."""

    def __init__(self, session: RewindableSession, proposer: Proposer, pace: Pace) -> None:
        self._session, self._proposer, self._pace = session, proposer, pace
        self._lock = threading.Lock()  # a session holds one text at a time
        self.max_length, self.facts = session.max_length, session.facts

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        """See `text.Runtime`; samples are those of `runtimes.SessionRuntime`."""
        num_steps = num_proposed = num_accepted = 0
        for index, prompt in enumerate(prompts):
            with self._lock:
                work = self._generate(index, list(prompt), sampling, eos_ids, on_token)
            num_steps += work.num_steps
            num_proposed += work.num_proposed or 0
            num_accepted += work.num_accepted or 0
        return Work(num_steps=num_steps, num_proposed=num_proposed, num_accepted=num_accepted)

    def _generate(
        self, index: int, tokens: list[int], sampling: Sampling, eos_ids: frozenset[int], on_token: OnToken
    ) -> Work:
        generator = np.random.default_rng([sampling.seed, index])
        end = len(tokens) + sampling.max_new_tokens

        def keep(logits: Logits) -> tuple[int, bool]:
            token = _choose(logits, generator, sampling)
            tokens.append(token)
            return token, on_token(index, token) or token in eos_ids or len(tokens) == end

        num_steps = num_proposed = num_accepted = 0
        _, ended = keep(self._session.prefill(np.array([tokens], np.int64))[0, -1])
        while not ended:
            width = min(self._pace.width(), end - len(tokens) - 1)
            if width > 0:
                started_at = time.perf_counter()
                self._proposer.read(tokens)
                self._pace.took_more(time.perf_counter() - started_at)
            started_at = time.perf_counter()
            guesses = self._proposer.propose(tokens, width) if width > 0 else []
            logits = self._session.append(np.array([[tokens[-1], *guesses]], np.int64), len(guesses) + 1)[0]
            elapsed_s = time.perf_counter() - started_at
            num_right = 0
            for row, guess in zip(logits, [*guesses, None], strict=True):
                token, ended = keep(row)
                num_right += token == guess
                if ended or token != guess:
                    break
            num_steps += 1
            num_proposed += len(guesses)
            num_accepted += num_right
            if not guesses:
                self._pace.took_plain(elapsed_s)
            elif not ended:
                self._pace.took_round(elapsed_s, len(guesses), num_right)
                self._session.rewind(len(tokens) - 1)
        return Work(num_steps=num_steps, num_proposed=num_proposed, num_accepted=num_accepted)

    def close(self) -> None:
        """Frees the model and the proposer."""
        self._session.close()
        self._proposer.close()


def _choose(logits: Logits, generator: np.random.Generator, sampling: Sampling) -> int:
    """A token out of logits [vocab_size]."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    return int(choose(logits[None], [generator], temperature=temperature, top_k=top_k, top_p=top_p)[0])
