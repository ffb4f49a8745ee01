"""Make a model cheaper to serve, prove that it still answers well, and register the best of what passed."""

import time

from prefect import flow

from flows.check import obstacles
from flows.deciding import decide
from flows.diagnosing import diagnose_candidates
from flows.fanning import fan_out
from flows.outcome import Outcome, figures_of_winner, submitted
from flows.pipeline import pipeline
from flows.recipe import Recipe
from flows.reporting import description, publish_artifacts, publish_report, report_data
from flows.running import Runner
from infra.console import console
from infra.registry import Version
from infra.tracking import end_flow, flow_run
from tasks.register import record_verdicts, register


@flow(name="optimize", flow_run_name="optimize-{recipe.name}", persist_result=False)
def optimize(recipe: Recipe) -> Outcome:
    """Run the recipe: every candidate made, compiled, measured and judged; the best accepted one registered.

    Args:
        recipe: What to make of which model.

    Raises:
        ValueError: this machine cannot do what the recipe asks for; said before anything heavy starts.
    """
    if reasons := obstacles(recipe):
        raise ValueError("This machine cannot run the recipe: " + " ".join(reasons))
    started_at = time.monotonic()
    with flow_run(f"optimize {recipe.name}", recipe_json=recipe.model_dump_json(indent=1), tags={}) as parent:
        console.print(f"[bold]{recipe.name}[/] from {recipe.source}")
        run = Runner.of(recipe, parent)
        fan_out(recipe, run)
        products = pipeline(recipe, run)
        judgements = decide(recipe, products, run)
        diagnoses = diagnose_candidates(recipe, products, judgements, run)
        found = report_data(recipe, products, judgements, diagnoses, run.records, parent)
        record_verdicts(products.bundles, judgements, parent)
        version = None
        if found.winner and recipe.register_as:
            figures = {name: f"{value:.6g}" for name, value in figures_of_winner(found).items()}
            registered = register(
                recipe.register_as,
                products.bundles[found.winner],
                parent=parent,
                verdict=judgements[found.winner].verdict,
                tags={"candidate": found.winner, "recipe": recipe.name, **figures},
                description=description(found),
            )
            if isinstance(registered, Version):
                version = registered
            else:
                found = found.model_copy(update={"register_note": submitted(registered)})
        outcome = publish_report(found, version, parent, elapsed_s=time.monotonic() - started_at)
    end_flow(parent, "FINISHED", outcome.metrics())
    publish_artifacts(outcome, parent)
    return outcome
