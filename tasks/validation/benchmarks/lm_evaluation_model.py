"""An engine as lm-evaluation-harness sees a model: likelihoods and greedy text."""

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM

from tasks.calibration.progress import Report
from tasks.engines.text import Sampling, TextGenerator
from tasks.validation.benchmarks.likelihood import Request, score

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from tasks.engines.generation import Session

MAX_NEW_TOKENS = 256
"""Where a task does not say: the harness' own default."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Requests of the harness, answered by an engine's session and its generator."""

    def __init__(
        self,
        report: Report,
        *,
        generator: TextGenerator | None = None,
        scorer: "tuple[Session, PreTrainedTokenizerBase] | None" = None,
    ) -> None:
        """Takes a generator for tasks whose answers are written, else a session with its tokenizer."""
        super().__init__()
        self._report = report
        if generator:
            self._generator, self.tokenizer = generator, generator.tokenizer
        if scorer:
            self._session, self.tokenizer = scorer

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("A text without context begins after a special token; this tokenizer has neither BOS nor EOS.")

    @property
    def tokenizer_name(self) -> str:
        """For the harness' cache of requests, which is not used."""
        return str(getattr(self.tokenizer, "name_or_path", ""))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with the special tokens that the tokenizer adds itself, unless told otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _loglikelihood_tokens(
        self, requests: "list[tuple[tuple[str, str], list[int], list[int]]]", **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for (_, continuation), context, tokens in requests:
            if not tokens:
                raise ValueError(f"A continuation must have a token; got {continuation!r}.")
            # A context that is too long loses its beginning, as in the harness' own models.
            room = self._session.max_length + 1 - len(tokens)
            if room < 1:
                raise ValueError(
                    f"A continuation must fit the engine's {self._session.max_length} tokens; one has {len(tokens)}. "
                    "Compile the engine with a larger max_length."
                )
            asked.append(Request(tuple(context[-room:]), tuple(tokens)))
        return [(found.log_probability, found.is_greedy) for found in score(self._session, asked, self._report)]

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: in windows, each token predicted once, with at least one token before it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for (text,) in [request.args for request in requests]:
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.eot_token_id,
                    max_seq_len=self._session.max_length,
                    context_len=1,
                )
            ]
            asked = [Request(tuple(context), tuple(tokens)) for context, tokens in windows]
            totals.append(sum(found.log_probability for found in score(self._session, asked)))
            self._report(len(totals), len(requests), {})
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to one of the task's stop texts.

        Raises:
            ValueError: a task samples.
        """
        texts = []
        for context, options in [request.args for request in requests]:
            sampling = _sampling(options)
            room = self._generator.runtime.max_length + 1 - sampling.max_new_tokens
            prompt = self.tok_encode(context)[-room:]
            (answer,), _ = self._generator.answer([prompt], sampling)
            texts.append(answer.text)
            self._report(len(texts), len(requests), {})
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )


def _sampling(options: dict[str, Any]) -> Sampling:
    until = options.get("until") or []
    if options.get("do_sample") and options.get("temperature", 0) > 0:
        raise ValueError(
            f"Answers are greedy here, so that models can be compared; the task samples with temperature "
            f"{options['temperature']}. Set `do_sample: false` in its generation_kwargs."
        )
    stop = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(
        max_new_tokens=options.get("max_gen_toks", MAX_NEW_TOKENS), stop=tuple(text for text in stop if text)
    )
