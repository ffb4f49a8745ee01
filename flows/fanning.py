"""Make candidates side by side on the nodes of a cluster, before the flow walks the pipeline.

Every stage is kept by its content and locked while it runs, so this decides nothing: it makes results earlier, and
elsewhere. Each candidate is one job that walks its own part of the pipeline; what a node had finished when it died is
found by the job's next attempt. Afterwards the flow finds everything in the cache, and times the engines itself, side
by side on its own machine. All nodes need the same store and servers as the flow.
"""

import socket

from prefect import flow
from prefect.client.orchestration import get_client

from flows.pipeline import ORIGINAL, begin, import_original, make
from flows.recipe import Recipe
from flows.resources import ON_GPU
from flows.running import Runner
from infra.cluster import call_everywhere, require_answer
from infra.console import console
from infra.settings import prepare_environment, settings, shared_environment
from infra.tracking import Parent, kill_running_children


def fan_out(recipe: Recipe, run: Runner) -> None:
    """Make every candidate of `recipe` on the cluster of SLIMLINE_RAY_ADDRESS; nothing without one.

    Stages that all candidates need are run here first. A candidate that failed there is tried here once more when the
    flow comes to it.

    Raises:
        StageError: what all candidates need failed.
        InfrastructureError: the cluster does not answer.
    """
    address = settings().ray_address
    if not address:
        return
    require_answer(address)
    begin(recipe, import_original(recipe, run), run)
    names = (ORIGINAL, *recipe.candidates)
    with get_client(sync_client=True) as prefect:
        api_url = str(prefect.api_url).rstrip("/")
    given = (recipe.model_dump_json(), run.parent.model_dump_json())
    console.print(f"  making {len(names)} candidates on the cluster at {address}")
    results = call_everywhere(
        make_one,
        {name: (name, *given) for name in names},
        address=address,
        num_cpus=settings().num_threads,
        num_gpus={name: 1 for name in names if _runs_on_gpu(name, recipe)},
        environment={**shared_environment(), "PREFECT_API_URL": api_url},
    )
    for name, (node, failures) in results:
        console.print(f"  [green]made[/]  {name} on {node}")
        for failure in failures:
            console.print(f"    failed there: {failure}", markup=False, soft_wrap=True)
    kill_running_children(run.parent)  # of nodes that died


def make_one(name: str, recipe_json: str, parent_json: str) -> tuple[str, list[str]]:
    """On a node: make one candidate; the node's name, and what failed."""
    prepare_environment()
    recipe, parent = Recipe.model_validate_json(recipe_json), Parent.model_validate_json(parent_json)
    return socket.gethostname(), make_candidate(name, recipe, parent)


@flow(name="make-candidate", flow_run_name="make-{name}", persist_result=False)
def make_candidate(name: str, recipe: Recipe, parent: Parent) -> list[str]:
    """One candidate of a recipe made on another machine; what failed of it."""
    run = Runner.of(recipe, parent)
    products = begin(recipe, import_original(recipe, run), run)
    return [str(error) for error in make(name, recipe, products, run)]


def _runs_on_gpu(name: str, recipe: Recipe) -> bool:
    engines = recipe.baseline_engines() if name == ORIGINAL else recipe.engines_of(recipe.candidates[name])
    return any(engine.engine in ON_GPU for engine in engines)
