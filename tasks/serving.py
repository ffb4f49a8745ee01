"""What MLflow loads of a registered version: text after each prompt, or an encoder's vector of each text.

MLflow runs this file by itself (models from code), wherever the version is loaded; `tasks` and `infra` travel with it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from tasks.engines.text import Sampling


class Served(PythonModel):
    """Generates with an engine bundle, or encodes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine, on as many threads as tuning found or else on all cores this process may use.

        Raises:
            infra.signing.Unverified: a file of the version is not as a trusted key signed it.
        """
        from infra.signing import check, signature_of
        from tasks.calibration.checkpoints import load_tokenizer
        from tasks.calibration.exported_families import kind_at
        from tasks.engines.compiling import load_generator, num_cores, runnable
        from tasks.engines.exported_bundle import load_for

        bundle = Path(context.artifacts["bundle"])
        version = bundle.parents[1]
        check(version, signature_of(version), imported=True)
        self.encoder: Any = None
        if kind_at(bundle) == "encoder":
            self.encoder = load_for(bundle, runnable(bundle, verify=True).engine, threads=num_cores())
            self.tokenizer = load_tokenizer(bundle)
        else:
            self.generator = load_generator(bundle, threads=None)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str] | list[list[float]]:
        """The text after each prompt, without it; of an encoder, the embedding of each text.

        Args:
            context: unused; the engine is loaded.
            model_input: a list of prompts, or a table whose first column is `prompt`.
            params: max_new_tokens, temperature (0: the likeliest token), stop (texts that end an answer), seed; an
                encoder has none.

        Raises:
            ValueError: a parameter is not allowed, or a prompt is too long.
        """
        if self.encoder is not None:
            from tasks.engines.embedding import embed

            return [vector.tolist() for vector in embed(self.encoder, self.tokenizer, _prompts(model_input))]
        sampling = _sampling(params or {})
        prompts = [self.generator.encode(prompt) for prompt in _prompts(model_input)]
        answers, _ = self.generator.answer(prompts, sampling)
        return [answer.text for answer in answers]


def _sampling(params: dict[str, Any]) -> "Sampling":
    from pydantic import ValidationError

    from tasks.engines.text import Sampling

    try:
        return Sampling(
            max_new_tokens=int(params.get("max_new_tokens", 64)),
            temperature=float(params.get("temperature", 0.0)),
            stop=tuple(str(text) for text in params.get("stop", ())),
            seed=int(params.get("seed", 0)),
        )
    except ValidationError as error:
        first = error.errors()[0]
        name, said = ".".join(map(str, first["loc"])) or "params", first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {said}; got {first['input']!r}.") from None


def _prompts(table: pd.DataFrame) -> list[str]:
    """MLflow hands over the first column only: that of a list has no name, that of a table must be `prompt`."""
    column = table.columns[0]
    if column not in ("prompt", 0, "0"):
        raise ValueError(
            f"The first column must be 'prompt'; got {column!r}. Send that column only, or a list of texts."
        )
    return [str(prompt) for prompt in table[column].explode()]


mlflow.models.set_model(Served())
