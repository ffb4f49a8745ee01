"""Make candidates side by side on other machines, before the flow walks the pipeline.

Every stage is kept by its content and locked while it runs, so this decides nothing: it makes results earlier, and
elsewhere. Each candidate is one job, of a Ray cluster or of the workers of a Prefect pool, that walks its own part of
the pipeline; what a machine had finished when it died is found by the job's next attempt. Afterwards the flow finds
everything in the cache, and times the engines itself, side by side on its own machine. All machines need the same store
and servers as the flow.
"""

import socket
from collections.abc import Iterator, Sequence

from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.states import Completed

from flows.pipeline import ORIGINAL, begin, import_original, make
from flows.recipe import Recipe
from flows.resources import ON_GPU
from flows.running import Runner
from infra.cluster import call_everywhere, require_answer
from infra.console import console
from infra.pools import require_workers, run_everywhere
from infra.settings import prepare_environment, settings, shared_environment
from infra.tracking import Parent, kill_running_children

FLOW = "make-candidate"
ALL_MADE = "All of it was made."


def fan_out(recipe: Recipe, run: Runner) -> None:
    """Make every candidate of `recipe` where SLIMLINE_FAN_OUT says; nothing without it.

    Stages that all candidates need are run here first. A candidate that failed there is tried here once more when the
    flow comes to it.

    Raises:
        ValueError: the recipe trains on several nodes.
        StageError: what all candidates need failed.
        InfrastructureError: the cluster does not answer, or nobody works for the pool.
    """
    if not settings().fan_out:
        return
    if recipe.execution.training.nodes > 1:
        raise ValueError(
            f"A training by several nodes meets at the run's machine; SLIMLINE_FAN_OUT={settings().fan_out} takes it "
            "elsewhere. Unset the variable, or drop execution.training.nodes."
        )
    kind, _, where = str(settings().fan_out).partition(":")
    if kind == "ray":
        require_answer(where)
    else:
        require_workers(f"{FLOW}/{where}")
    begin(recipe, import_original(recipe, run), run)
    names = (ORIGINAL, *recipe.candidates)
    console.print(f"  making {len(names)} candidates by {settings().fan_out}")
    for name, place, failures in (_by_ray if kind == "ray" else _by_workers)(where, names, recipe, run.parent):
        console.print(f"  [green]made[/]  {name} on {place}")
        for failure in failures:
            console.print(f"    failed there: {failure}", markup=False, soft_wrap=True)
    kill_running_children(run.parent)  # of machines that died


def _by_ray(
    address: str, names: Sequence[str], recipe: Recipe, parent: Parent
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Candidates, the node that made each, and what failed of it."""
    with get_client(sync_client=True) as prefect:
        api_url = str(prefect.api_url).rstrip("/")
    given = (recipe.model_dump_json(), parent.model_dump_json())
    results = call_everywhere(
        make_one,
        {name: (name, *given) for name in names},
        address=address,
        num_cpus=settings().num_threads,
        num_gpus={name: 1 for name in names if _runs_on_gpu(name, recipe)},
        environment={**shared_environment(), "PREFECT_API_URL": api_url},
    )
    for name, (node, failures) in results:
        yield name, node, failures


def _by_workers(
    deployment: str, names: Sequence[str], recipe: Recipe, parent: Parent
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Candidates, the machine whose worker made each, and what failed of it."""
    given = {"recipe": recipe.model_dump(mode="json"), "parent": parent.model_dump(mode="json")}
    calls = {name: {"name": name, **given} for name in names}
    for name, ended in run_everywhere(f"{FLOW}/{deployment}", calls, key=parent.run_id):
        made = ended.completed and ended.message == ALL_MADE
        yield name, ended.where, () if made else (ended.message,)


def make_one(name: str, recipe_json: str, parent_json: str) -> tuple[str, list[str]]:
    """On a node: make one candidate; the node's name, and what failed."""
    prepare_environment()
    recipe, parent = Recipe.model_validate_json(recipe_json), Parent.model_validate_json(parent_json)
    failures: list[str] = make_candidate(name, recipe, parent)  # type: ignore[assignment]  # what its state holds
    return socket.gethostname(), failures


@flow(name=FLOW, flow_run_name="make-{name}", persist_result=False)
def make_candidate(name: str, recipe: Recipe, parent: Parent) -> State[list[str]]:
    """One candidate of a recipe, for a run on another machine, which starts this.

    Args:
        name: Of the candidate, or `original`.
        recipe: Of the run.
        parent: The MLflow run that stages are recorded under.

    Returns:
        What failed of it; in words, too, which other machines see.
    """
    run = Runner.of(recipe, parent)
    products = begin(recipe, import_original(recipe, run), run)
    failures = [str(error) for error in make(name, recipe, products, run)]
    return Completed(data=failures, message=" ".join(failures) or ALL_MADE)


def _runs_on_gpu(name: str, recipe: Recipe) -> bool:
    engines = recipe.baseline_engines() if name == ORIGINAL else recipe.engines_of(recipe.candidates[name])
    return any(engine.engine in ON_GPU for engine in engines)
