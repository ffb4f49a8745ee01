"""Calls of functions on the nodes of a Ray cluster; those on a node that dies are made again on another."""

import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.failures import InfrastructureError

ROOT = Path(__file__).parents[1]
CONNECT_S = 10.0
MAX_RETRIES = 5
"""Of a call whose node or process died."""


def call_everywhere(
    function: Any,
    calls: Mapping[str, Sequence[str]],
    *,
    address: str,
    num_cpus: int,
    num_gpus: Mapping[str, int],
    environment: Mapping[str, str],
) -> Iterator[tuple[str, Any]]:
    """Results of `function` by the names of `calls`, as they come.

    Args:
        function: importable on every node, which has the same version of this project installed.
        calls: its arguments; texts, so that nothing but JSON travels.
        address: of the cluster.
        num_cpus: that a call takes; a node makes as many calls at once as it has room for.
        num_gpus: that the calls of these names take.
        environment: of the calls, before anything is imported. Ray logs it: no credentials.

    Raises:
        InfrastructureError: there is no cluster at the address, or nodes died too often.
    """
    try:
        import ray
        import ray.exceptions as died
    except ImportError:
        raise InfrastructureError(
            f"SLIMLINE_FAN_OUT=ray:{address} needs Ray, which is not installed. Install the extra 'ray', or unset the "
            "variable."
        ) from None
    variables = {**environment, "PYTHONPATH": str(ROOT)}
    try:
        ray.init(
            address=address,
            namespace="slimline",
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise _silent(address, error) from None
    try:
        remote = ray.remote(max_retries=MAX_RETRIES)(function)
        waiting = {
            remote.options(num_cpus=num_cpus, num_gpus=num_gpus.get(name, 0)).remote(*arguments): name
            for name, arguments in calls.items()
        }
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting))
            name = waiting.pop(ready)
            try:
                yield name, ray.get(ready)
            except (died.RaySystemError, died.WorkerCrashedError, died.NodeDiedError) as error:
                raise InfrastructureError(f"{name} could not be made on the cluster: {error}") from error
    finally:
        ray.shutdown()


def require_answer(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself goes on asking for minutes.

    Raises:
        InfrastructureError: nobody does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():  # "auto" and "local", which name no machine
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise _silent(address, error) from None


def _silent(address: str, error: Exception) -> InfrastructureError:
    return InfrastructureError(
        f"No Ray cluster answers at SLIMLINE_FAN_OUT=ray:{address}: {error}. Start it (`ray start --head`), or unset "
        "the variable."
    )
