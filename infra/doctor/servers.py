"""MLflow and Prefect, asked as a flow asks them: with this environment's addresses, credentials and certificates."""

import email.utils
import ipaddress
import socket
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from infra import services
from infra.doctor.finding import Finding, ok, problem, skipped, warning
from infra.settings import outer, prepare_environment, settings, shown

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ANSWER_S = 20.0
MAX_SKEW_S = 30.0
"""Schedules, leases and heartbeats compare clocks of several machines; S3 refuses requests that are 15 minutes off."""
CERTIFICATES = {
    "MLFLOW_TRACKING_SERVER_CERT_PATH": "MLflow's clients",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH": "MLflow's clients, to say who they are",
    "PREFECT_API_SSL_CERT_FILE": "Prefect's clients",
    "AWS_CA_BUNDLE": "S3's clients",
    "SSL_CERT_FILE": "Python's ssl",
    "REQUESTS_CA_BUNDLE": "requests (MLflow)",
}
UNVERIFIED = {"MLFLOW_TRACKING_INSECURE_TLS": "MLflow", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY": "Prefect"}


def network() -> Iterator[Finding]:
    """Whether the names of the servers can be resolved, and whether secrets travel unencrypted."""
    addresses = {
        "MLflow": settings().tracking_uri or "",
        "Prefect": settings().prefect_api_url or outer("PREFECT_API_URL") or "",
        "S3": settings().s3_endpoint_url or outer("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or "",
    }
    urls = {of: url for of, url in addresses.items() if url.startswith(("http://", "https://"))}
    unknown = {urlsplit(url).hostname or "" for url in urls.values()}
    unknown = {host for host in unknown if not _resolves(host)}
    if unknown:
        yield problem(
            "names",
            f"{', '.join(sorted(unknown))} cannot be resolved here",
            "Check the addresses, and the DNS here",
        )
    elif urls:
        yield ok("names", f"the servers of {', '.join(urls)} can be resolved")
    else:
        yield skipped("names", "no address of a server is set: SLIMLINE_TRACKING_URI, SLIMLINE_PREFECT_API_URL")
    yield from _encryption(urls)


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _encryption(urls: Mapping[str, str]) -> Iterator[Finding]:
    name = "encryption"
    missing = {variable: path for variable in CERTIFICATES if (path := outer(variable)) and not Path(path).exists()}
    skips = [of for variable, of in UNVERIFIED.items() if (outer(variable) or "").lower() in ("1", "true")]
    secrets = {
        "MLflow": outer("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
        "Prefect": outer("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"),
        "S3": "signed requests",
    }
    open_ones = [f"{of} ({shown(url)})" for of, url in urls.items() if url.startswith("http:") and not is_local(url)]
    open_ones = [each for each in open_ones if secrets[each.partition(" ")[0]]]
    if missing:
        for variable, path in missing.items():
            yield problem(
                name,
                f"{variable}={path}: there is no such file; {CERTIFICATES[variable]} cannot check certificates",
                "Mount the certificate of your authority there, or unset the variable",
            )
    elif skips:
        yield warning(
            name,
            f"certificates are not checked by {' and '.join(skips)}",
            "Give the authority's certificate instead: MLFLOW_TRACKING_SERVER_CERT_PATH, PREFECT_API_SSL_CERT_FILE",
        )
    elif open_ones:
        yield warning(
            name,
            f"credentials and data go unencrypted to {', '.join(open_ones)}",
            "Put TLS in front of it and write https://, or keep the network to these machines",
        )
    else:
        used = [variable for variable in CERTIFICATES if outer(variable)]
        remote = [of for of, url in urls.items() if url.startswith("https:")]
        if remote:
            by = f"certificates from {', '.join(used)}" if used else "the system's or certifi's authorities"
            yield ok(name, f"TLS to {', '.join(remote)}, {by}")
        elif urls:
            yield ok(name, "no secret leaves this machine unencrypted")
        else:
            yield skipped(name, "no server is set")


def is_local(url: str) -> bool:
    """Whether an address is of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def mlflow() -> Iterator[Finding]:
    """Whether runs can be recorded."""
    from infra import tracking

    uri, name = tracking.tracking_uri(), "mlflow"
    if not uri.startswith(("http://", "https://")):
        yield skipped(name, f"no server is set (SLIMLINE_TRACKING_URI) and none runs; runs are kept in {shown(uri)}")
        return
    try:
        answer = tracking.ask(uri, "/api/2.0/mlflow/experiments/search", {"max_results": 1}, timeout_s=ANSWER_S)
    except OSError as error:  # requests' errors are
        yield _unreachable(name, uri, error, "SLIMLINE_TRACKING_URI")
        return
    yield from clock("MLflow", _skew_s(answer.headers))
    host = urlsplit(uri).netloc.rpartition("@")[2]
    if answer.status == 403 and "host header" in answer.body.lower():
        yield problem(
            name,
            f"{shown(uri)} refuses the name it is called by: {answer.body.strip()[:120]}",
            f"Start it with --allowed-hosts (MLFLOW_SERVER_ALLOWED_HOSTS) naming {host}, port included; its /health "
            "answers whatever the name",
        )
    elif answer.status in (401, 403):
        user = outer("MLFLOW_TRACKING_USERNAME")
        who = f"the user {user!r} of MLFLOW_TRACKING_USERNAME" if user else "a caller without credentials"
        yield problem(
            name,
            f"{shown(uri)} refuses {who} ({answer.status})",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account of it, or MLFLOW_TRACKING_TOKEN",
        )
    elif answer.status != 200 or ('"experiments"' not in answer.body and answer.body.strip() != "{}"):
        yield problem(
            name,
            f"{shown(uri)} answers {answer.status}: {answer.body.strip()[:160]!r}",
            "Is it MLflow's server that listens there? Its log says more",
        )
    else:
        started_at = time.monotonic()  # the first request has imported MLflow
        theirs = tracking.server_version(uri, timeout_s=ANSWER_S)
        yield _compared(name, shown(uri), theirs, "mlflow", 1000 * (time.monotonic() - started_at))


def _compared(name: str, where: str, theirs: str, library: str, elapsed_ms: float) -> Finding:
    ours = version(library)
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        return problem(
            name,
            f"{where} is {library} {theirs}; this machine has {ours}",
            f"Run the same minor version on both: pip install {library}=={ours} there, or the release of Slimline that "
            "is made for it here",
        )
    return ok(name, f"{where}: {theirs}, answers in {elapsed_ms:.0f} ms")


def _unreachable(name: str, uri: str, error: OSError, variable: str) -> Finding:
    said = " ".join(str(error).split()).lower()
    kind = type(error).__name__.lower()
    if "certificate" in said or "sslerror" in kind:
        return problem(
            name,
            f"the certificate of {shown(uri)} is not trusted here: {' '.join(str(error).split())[-160:]}",
            "Name your authority's file: MLFLOW_TRACKING_SERVER_CERT_PATH, PREFECT_API_SSL_CERT_FILE, AWS_CA_BUNDLE",
        )
    why = "does not answer in time" if "timeout" in kind or "timed out" in said else "cannot be reached"
    if "refused" in said:
        why = "cannot be reached: nobody listens there"
    return problem(name, f"{shown(uri)} {why}", f"Start the server, or correct {variable}; a firewall may be between")


def clock(server: str, skew_s: float | None) -> Iterator[Finding]:
    """A finding where our time is ahead of a server's by more than may be, or behind it."""
    if skew_s is not None and abs(skew_s) > MAX_SKEW_S:
        yield problem(
            "clock",
            f"this machine is {abs(skew_s):,.0f} s {'ahead of' if skew_s > 0 else 'behind'} {server}",
            "Set both clocks by NTP: timedatectl set-ntp true",
        )


def _skew_s(headers: Mapping[str, str]) -> float | None:
    """Seconds by which our clock is ahead of the Date in an answer's headers, within a second."""
    said = headers.get("Date")
    if not said:
        return None
    return time.time() - email.utils.parsedate_to_datetime(said).timestamp()


def prefect() -> Iterator[Finding]:
    """Whether flows can be recorded and started, and whether somebody takes what is scheduled."""
    prepare_environment(**services.for_clients(settings().home))
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    name, url = "prefect", PREFECT_API_URL.value()
    if not url:
        yield skipped(name, "no server is set (SLIMLINE_PREFECT_API_URL) and none runs: a flow starts one of its own")
        return
    import httpx

    started_at = time.monotonic()
    with get_client(httpx_settings={"timeout": ANSWER_S}, sync_client=True) as client:
        try:
            answer = client.request("GET", "/admin/version")
            theirs = str(answer.json())
            client.request("POST", "/flows/filter", json={"limit": 1})  # asks the database, too
        except httpx.HTTPStatusError as error:
            yield _refused(url, error.response.status_code, error.response.text)
            return
        except httpx.HTTPError as error:
            yield _unreachable(name, url, OSError(f"{type(error).__name__}: {error}"), "SLIMLINE_PREFECT_API_URL")
            return
        except ValueError:  # not JSON
            yield _refused(url, answer.status_code, answer.text)
            return
        yield from clock("Prefect", _skew_s(answer.headers))
        yield _compared(name, shown(url), theirs, "prefect", 1000 * (time.monotonic() - started_at))
        yield from deployments(client)
        yield from slots(client)


def _refused(url: str, status: int, body: str) -> Finding:
    if status in (401, 403):
        return problem(
            "prefect",
            f"{shown(url)} refuses the caller ({status})",
            "Set PREFECT_API_AUTH_STRING to what the server has in PREFECT_SERVER_API_AUTH_STRING",
        )
    hint = "" if urlsplit(url).path.rstrip("/").endswith("/api") else " Its address ends in /api."
    return problem(
        "prefect",
        f"{shown(url)} answers {status}: {' '.join(body.split())[:160]!r}",
        f"Is it Prefect's API that listens there?{hint} Where its migrations have not run: "
        "prefect server database upgrade",
    )


def deployments(client: "SyncPrefectClient") -> Iterator[Finding]:
    """Whether there are deployments, pools for them, and workers that poll."""
    offered = _all(client, "/deployments/filter")
    offered = [each for each in offered if str(each["entrypoint"] or "").startswith("flows.")]
    if not offered:
        yield problem("deployments", "the server knows none of Slimline's", "Create them: slimline deploy")
        return
    paused = [each["name"] for each in offered if each["paused"]]
    if paused:
        yield warning(
            "deployments",
            f"{', '.join(paused)} of {len(offered)} take no runs: paused",
            "prefect deployment schedule resume, or the switch on the deployment's page",
        )
    else:
        yield ok("deployments", ", ".join(sorted(each["name"] for each in offered)))
    served = [each for each in offered if not each["work_pool_name"]]
    silent = [each["name"] for each in served if each["status"] != "READY"]
    if silent:
        yield problem(
            "deployments", f"nobody serves {', '.join(silent)}", "Start what serves them: slimline up, or a worker"
        )
    pools = {each["name"]: each for each in _all(client, "/work_pools/filter")}
    wanted = sorted({each["work_pool_name"] for each in offered if each["work_pool_name"]})
    workers = {
        name: _all(client, "/work_pools/{work_pool_name}/workers/filter", work_pool_name=name)
        for name in wanted
        if name in pools
    }
    somebody_works = any(worker["status"] == "ONLINE" for each in workers.values() for worker in each)
    for name in wanted:
        yield _pool(name, pools.get(name), workers.get(name, []), somebody_works)


def _pool(name: str, pool: dict[str, Any] | None, workers: list[dict[str, Any]], somebody_works: bool) -> Finding:
    """Whether runs of the pool are taken; one that never had a worker may be for machines that are still to come."""
    title = f"pool {name}"
    if pool is None:
        return problem(title, "does not exist; deployments name it", "Create it: slimline deploy")
    if pool["is_paused"]:
        return problem(title, "is paused: its runs wait", f"prefect work-pool resume {name}")
    if pool["type"].endswith((":push", ":managed")):
        return ok(title, f"of type {pool['type']}, which needs no worker")
    online = sorted(worker["name"] for worker in workers if worker["status"] == "ONLINE")
    if not online:
        seen = max((str(worker["last_heartbeat_time"]) for worker in workers), default="never")[:19]
        wrong = warning if somebody_works and not workers else problem
        return wrong(
            title,
            f"no worker polls it (last seen: {seen})",
            f"Start one: prefect worker start --pool {name} --with-healthcheck",
        )
    limit = pool["concurrency_limit"]
    runs = "any number of runs" if limit is None else f"{limit} run{'s' * (limit != 1)} at a time"
    return ok(title, f"{pool['type']}, {runs}, {len(online)} worker{'s' * (len(online) > 1)}: {', '.join(online[:4])}")


def slots(client: "SyncPrefectClient") -> Iterator[Finding]:
    """Whether limits hold slots for runs that are gone."""
    limits = _all(client, "/v2/concurrency_limits/filter")
    ours = [limit for limit in limits if not limit["name"].startswith("deployment:")]
    held = [limit for limit in limits if limit["active_slots"] and limit["active"]]
    going = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING", "PAUSED"]}}}
    busy = client.request("POST", "/flow_runs/count", json={"flow_runs": going}).json()
    if held and not busy:
        names = ", ".join(f"{limit['name']} ({limit['active_slots']} of {limit['limit']})" for limit in held)
        yield problem(
            "slots",
            f"{names} are held and no flow runs",
            f"Free them: prefect gcl update {held[0]['name']} --active-slots 0; leases end by themselves after some "
            "minutes",
        )
    elif not limits:
        yield skipped("slots", "the server has no concurrency limit")
    else:
        taken = f"{sum(limit['active_slots'] for limit in held):.0f} slots held by {busy} going flow runs"
        yield ok("slots", f"{', '.join(limit['name'] for limit in ours) or 'of deployments only'}; {taken}")


def _all(client: "SyncPrefectClient", path: Any, **path_params: str) -> list[dict[str, Any]]:
    """Everything a filter lists, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        body = {"limit": 200, "offset": len(found)}
        page = client.request("POST", path, path_params=path_params, json=body).json()
        found += page
        if len(page) < 200:
            return found
