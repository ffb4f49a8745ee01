"""Offer the flows to the Prefect server, so that people and schedules can start them: `slimline up` runs this.

Workers in production use the same entrypoints through prefect.yaml.
"""

from typing import Any

from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.types.entrypoint import EntrypointType

from infra.settings import prepare_environment


def deployments() -> list[RunnerDeployment]:
    """The deployments of this application."""
    from flows.optimize import optimize
    from flows.start import start

    # By path, Prefect would load a second copy of every class: see docs/decisions/0001-architecture.md.
    options: dict[str, Any] = {"tags": ["slimline"], "entrypoint_type": EntrypointType.MODULE_PATH}
    offered = [
        start.to_deployment("start", description="A form: model, recipe, engines, limits.", **options),
        optimize.to_deployment("optimize", description="A whole recipe, as JSON.", **options),
    ]
    return [deployment for deployment in offered if isinstance(deployment, RunnerDeployment)]


if __name__ == "__main__":
    prepare_environment()
    serve(*deployments(), limit=1, pause_on_shutdown=False)  # two optimizations at once would spoil each other's timing
