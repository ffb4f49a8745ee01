"""Where bytes are kept: the artifact store, Redis, and the databases of this machine."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from infra.doctor.finding import Finding, ok, problem, skipped
from infra.doctor.servers import clock
from infra.settings import outer, settings, shown

ANSWER_S = 10.0
S3_MAX_SKEW_S = 15 * 60
"""S3 refuses requests signed by a clock that is further off."""
REVISION = "SELECT version_num FROM alembic_version"


def store() -> Iterator[Finding]:
    """Whether artifacts can be written to the store, and read back as they were."""
    from infra import s3

    name, uri = "store", settings().store
    if uri is None:
        yield skipped(name, f"no S3 is set (SLIMLINE_STORE): artifacts lie in {settings().home / 'artifacts'}")
        return
    try:
        probe = s3.probe(uri)
    except FileNotFoundError as error:
        yield problem(name, str(error), "Create the bucket, or correct SLIMLINE_STORE")
    except PermissionError as error:
        yield problem(
            name,
            str(error),
            "The account needs s3:ListBucket of the bucket, and below the prefix s3:GetObject, s3:PutObject and "
            "s3:AbortMultipartUpload",
        )
    except ConnectionError as error:
        yield problem(name, str(error), "Start the store, or correct SLIMLINE_S3_ENDPOINT_URL")
    except (OSError, ValueError) as error:
        yield problem(name, str(error), "Read the store's own log")
    else:
        yield from clock(f"the store, which refuses requests that are {S3_MAX_SKEW_S} s off", probe.skew_s)
        end = "and removed" if probe.removed else "and left, because this account may not delete,"
        yield ok(
            name,
            f"{uri} at {shown(s3.endpoint())}: written, read {end} in {1000 * probe.elapsed_s:,.0f} ms; "
            f"{probe.multipart_mib:.0f} MiB in parts at {probe.multipart_mib_per_s:,.0f} MiB/s",
        )


def redis() -> Iterator[Finding]:
    """Whether locks can be taken and given back."""
    name, secret = "redis", settings().redis_url
    if secret is None:
        yield skipped(name, "not set (SLIMLINE_REDIS_URL): enough for one server and for workers of one machine")
        return
    url = secret.get_secret_value()
    from redis import Redis
    from redis.exceptions import AuthenticationError, ConnectionError, RedisError, TimeoutError

    key = f"slimline:doctor:{uuid.uuid4()}"
    started_at = time.monotonic()
    try:
        with Redis.from_url(url, socket_timeout=ANSWER_S, socket_connect_timeout=ANSWER_S) as client:
            taken = client.set(key, "1", nx=True, px=10_000)
            again = client.set(key, "2", nx=True, px=10_000)
            client.delete(key)
            version = str(client.info("server")["redis_version"])
    except AuthenticationError as error:
        yield problem(name, f"{shown(url)} refuses the password: {error}", "Correct it in SLIMLINE_REDIS_URL")
    except (ConnectionError, TimeoutError) as error:
        yield problem(name, f"{shown(url)} cannot be reached: {error}", "Start it, or correct SLIMLINE_REDIS_URL")
    except RedisError as error:
        yield problem(
            name,
            f"{shown(url)} answers: {error}",
            "Let this user call SET, GET, DEL, EVAL and INFO on slimline:*",
        )
    else:
        if taken and not again:
            yield ok(name, f"{shown(url)}: {version}, a lock in {1000 * (time.monotonic() - started_at):.0f} ms")
        else:
            yield problem(
                name, f"{shown(url)} gives one lock twice", "Use one Redis that is written to, not a proxy over several"
            )


def databases() -> Iterator[Finding]:
    """Whether the databases that this machine opens itself are at the version that its libraries expect."""
    home = settings().home
    known = (
        ("mlflow", "MLFLOW_BACKEND_STORE_URI", "sqlite", home / "mlflow.db"),
        ("prefect", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite", home / "prefect" / "prefect.db"),
    )
    found = False
    for of, variable, driver, file in known:
        uri = outer(variable) or (f"{driver}:///{file}" if file.exists() else "")
        if uri.startswith(("sqlite", "postgresql")):
            found = True
            yield _schema(of, uri)
    if not found:
        yield skipped(
            "databases", f"{home} holds none yet, and no server's is named here; servers look after their own"
        )


def _schema(of: str, uri: str) -> Finding:
    """Whether the tables are those that the installed library expects."""
    from sqlalchemy.exc import SQLAlchemyError

    name = f"database of {of}"
    upgrade = f"mlflow db upgrade {shown(uri)}" if of == "mlflow" else "prefect server database upgrade --yes"
    try:
        current = asyncio.run(_revision(uri)) if "+a" in uri.partition(":")[0] else _revision_of_sync(uri)
    except ImportError as error:
        return problem(name, f"{shown(uri)} needs a driver: {error}", "Install it: pip install 'slimline[servers]'")
    except (SQLAlchemyError, OSError) as error:
        said = " ".join(str(getattr(error, "orig", error)).split())[:200]
        if "alembic_version" in said:
            return problem(name, f"{shown(uri)} is empty: its tables were never made", f"Make them, once: {upgrade}")
        return problem(name, f"{shown(uri)} cannot be read: {said}", "Start it, or correct its address and password")
    expected = _expected(of, uri)
    if current != expected:
        return problem(
            name,
            f"{shown(uri)} is at {current}; the {of} installed here expects {expected}",
            f"Stop its servers, back it up, and migrate it: {upgrade}. Where it is the newer one, update Slimline here",
        )
    return ok(name, f"{shown(uri)} is at {current}, as expected")


def _revision_of_sync(uri: str) -> str | None:
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            return connection.execute(text(REVISION)).scalar()
    finally:
        engine.dispose()


async def _revision(uri: str) -> str | None:
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(uri)
    try:
        async with engine.connect() as connection:
            return (await connection.execute(text(REVISION))).scalar()
    finally:
        await engine.dispose()


def _expected(of: str, uri: str) -> str:
    if of == "mlflow":
        from infra import tracking

        return tracking.expected_schema()
    import prefect.server.database
    from alembic.script import ScriptDirectory

    migrations = Path(prefect.server.database.__file__).parent / "_migrations"
    versions = migrations / "versions" / ("sqlite" if uri.startswith("sqlite") else "postgresql")
    return str(ScriptDirectory(str(migrations), version_locations=[str(versions)]).get_current_head())
