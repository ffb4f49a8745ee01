"""What MLflow loads of a registered version: text after each prompt, from the version's engine bundle.

MLflow runs this file by itself (models from code), wherever the version is loaded; `tasks` travels with it.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Generator(PythonModel):
    """Generates with an engine."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine, on as many threads as tuning found or else on all cores this process may use."""
        from tasks.engines.compiling import load_generator

        self.generator = load_generator(Path(context.artifacts["bundle"]), threads=None)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """The text after each prompt, without it.

        Args:
            context: unused; the engine is loaded.
            model_input: a list of prompts, or a table whose first column is `prompt`.
            params: max_new_tokens, temperature (0: the likeliest token), seed.
        """
        from tasks.engines.text import Sampling

        options = params or {}
        sampling = Sampling(
            max_new_tokens=int(options.get("max_new_tokens", 64)),
            temperature=float(options.get("temperature", 0.0)),
            seed=int(options.get("seed", 0)),
        )
        prompts = [self.generator.encode(prompt) for prompt in _prompts(model_input)]
        answers, _ = self.generator.answer(prompts, sampling)
        return [answer.text for answer in answers]


def _prompts(table: pd.DataFrame) -> list[str]:
    """MLflow hands over the first column only: that of a list has no name, that of a table must be `prompt`."""
    column = table.columns[0]
    if column not in ("prompt", 0, "0"):
        raise ValueError(
            f"The first column must be 'prompt'; got {column!r}. Send that column only, or a list of texts."
        )
    return [str(prompt) for prompt in table[column].explode()]


mlflow.models.set_model(Generator())
