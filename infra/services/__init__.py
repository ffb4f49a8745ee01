"""The local servers of a home: SeaweedFS (S3), MLflow, Prefect and a worker, under one supervisor.

`up` starts the supervisor in a session of its own and returns when everything answers; `down` ends all of it.
"""

from infra.services.addresses import Addresses, Database, Services, addresses, for_clients, running
from infra.services.inner_server import begin_inner_server, start_inner_server
from infra.services.processes import ProcessId, end_orphans, run_mark
from infra.services.stack import down, up

__all__ = [
    "Addresses",
    "Database",
    "ProcessId",
    "Services",
    "addresses",
    "begin_inner_server",
    "down",
    "end_orphans",
    "for_clients",
    "run_mark",
    "running",
    "start_inner_server",
    "up",
]
