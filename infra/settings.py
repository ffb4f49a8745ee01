"""Where Slimline keeps things and whom it talks to: the environment, typed. Nothing else reads os.environ.

Every setting is an environment variable with the prefix SLIMLINE_ (SLIMLINE_HOME, SLIMLINE_THREADS, ...).
"""

import difflib
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "SLIMLINE_"
MARKS = ("SLIMLINE_RUN", "SLIMLINE_SERVICES_OF")
"""Not settings: what our own processes are found by."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""No telemetry, and no chatter in the terminal of someone who did not ask for it."""


class Settings(BaseSettings):
    """Settings of this process, from the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    home: Path = Field(Path(".slimline"), description="Everything Slimline writes: artifacts, databases, logs.")
    tracking_uri: str | None = Field(None, description="MLflow server; default: <home>/mlflow.db, no server.")
    prefect_api_url: str | None = Field(None, description="Prefect server; default: inside the process, no server.")
    store: str | None = Field(
        None,
        pattern=r"^s3://[^/]+(/[^/]+)*/?$",
        description="Where artifacts and results of stages are kept: s3://BUCKET/PREFIX; default: <home>.",
    )
    release_store: str | None = Field(
        None,
        pattern=r"^s3://[^/]+(/[^/]+)*/?$",
        description="Where champions' bytes and the ledger are kept: s3://BUCKET/PREFIX; default: the store's place.",
    )
    cache_gib: float | None = Field(None, gt=0, description="Copies of a remote store's artifacts below the home; 100.")
    s3_endpoint_url: str | None = Field(None, description="S3 endpoint, for stores other than AWS.")
    redis_url: SecretStr | None = Field(
        None, description="Redis that locks stages between machines, redis://...; default: files below the home."
    )
    s3_region: str | None = Field(None, description="Default: AWS_REGION, AWS's configuration, or us-east-1.")
    s3_sse: Literal["AES256", "aws:kms"] | None = Field(None, description="Encryption by the server of what is sent.")
    s3_sse_kms_key_id: str | None = Field(None, description="Key for aws:kms; default: the account's.")
    s3_retry_s: float = Field(120, ge=0, description="For how long a request that fails for now is asked again.")
    notification_block: str | None = Field(
        None,
        pattern="^[^/]+/[^/]+$",
        description="Prefect block that is told of runs in trouble, as TYPE/NAME: slack-webhook/team.",
    )
    fan_out: str | None = Field(
        None,
        pattern="^(ray|prefect):.+$",
        description="Who makes candidates side by side: ray:HOST:PORT or ray:auto, the nodes of a Ray cluster; "
        "prefect:DEPLOYMENT, the workers of the pool of that deployment (prefect.yaml's is candidate).",
    )
    machine_lock: Path = Field(
        Path(tempfile.gettempdir()) / "slimline-machine.lock",
        description="Locked by all that run stages on this machine, so that timed ones run alone; containers share it.",
    )
    gpu_limit: str | None = Field(
        None, min_length=1, description="Prefect concurrency limit of which stages on a GPU take a slot, e.g. gpu-sm90."
    )
    signing_key: SecretStr | None = Field(
        None,
        description="Ed25519 private key that registered versions are signed with: a PEM file, or the PEM itself; "
        "default: one of the home, which is made.",
    )
    trusted_keys: str | None = Field(
        None,
        min_length=1,
        description="Public keys whose signatures count when versions are loaded: a file of PEMs, or the PEMs "
        "themselves; default: that of the key to sign with.",
    )
    webhook_secret: SecretStr | None = Field(
        None, min_length=16, description="What MLflow signs its webhooks with, which `slimline bridge` takes."
    )
    threads: int | None = Field(None, ge=1, description="Threads of engines and training; default: one per core.")

    @field_validator("store", "release_store")
    @classmethod
    def _without_slash(cls, store: str | None) -> str | None:
        return store and store.rstrip("/")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.cache_gib is not None and not self.store:
            raise ValueError("SLIMLINE_CACHE_GIB limits copies of a remote store; set SLIMLINE_STORE, or unset it.")
        if self.s3_sse_kms_key_id and self.s3_sse != "aws:kms":
            raise ValueError("SLIMLINE_S3_SSE_KMS_KEY_ID needs SLIMLINE_S3_SSE=aws:kms; set that, or unset it.")
        return self

    @property
    def num_threads(self) -> int:
        """Threads to compute with: as set, or the number of cores this process may use."""
        return self.threads or len(os.sched_getaffinity(0))


@cache
def settings() -> Settings:
    """The settings of this process.

    Raises:
        ValueError: a variable holds what it must not; the message names it.
    """
    _refuse_unknown()
    try:
        found = Settings()
    except ValidationError as error:
        problems = " ".join(_told(e) for e in error.errors())
        raise ValueError(f"The environment holds a setting that cannot be used: {problems}") from None
    return found.model_copy(update={"home": found.home.resolve()})


def _told(problem: "ErrorDetails") -> str:
    """The variable, what it holds, what is wrong with that, and what the setting is for."""
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    name = str(problem["loc"][0])
    meant = Settings.model_fields[name].description or ""
    return f"{PREFIX}{name.upper()}={problem['input']!r}: {problem['msg']}. {meant}".strip()


def _refuse_unknown() -> None:
    if not (Path(__file__).parents[1] / "flows").is_dir():
        return  # this file travels with registered versions, and settings come later than they do
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name in sorted(os.environ.keys() - known - set(MARKS)):
        if name.startswith(PREFIX):
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{name} is no setting.{hint} Settings: {', '.join(sorted(known))}. Unset it.")


def prepare_environment(**servers: str) -> None:
    """Set what Prefect, MLflow and the hub client read from the environment; call before importing them.

    What the user has set stays. `servers` (PREFECT_API_URL, MLFLOW_TRACKING_URI) names running servers to talk to.
    """
    home = settings().home
    (home / "prefect").mkdir(parents=True, exist_ok=True)  # Prefect's database is not created without it
    defaults = {
        **QUIET,
        "PREFECT_HOME": str(home / "prefect"),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch: large pages; a fifth less CPU in the distillation loss
        "OMP_NUM_THREADS": str(settings().num_threads),
        "MKL_NUM_THREADS": str(settings().num_threads),
        # A loaded machine needs longer than the default of 20 s to start the server inside the process.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
        # Flows speak through infra/console.py; Prefect's own log goes to its server, tracebacks included.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        # Python's clean-up after an interrupted stage would tell about the semaphores that it removes.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        **servers,
    }
    if settings().prefect_api_url:
        defaults["PREFECT_API_URL"] = str(settings().prefect_api_url)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def shared_environment() -> dict[str, str]:
    """What a process of this run on another machine needs from this one's environment; no credentials.

    Prefect reads its own when it is imported, so they have to be there before.
    """
    names = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} - {
        "SLIMLINE_REDIS_URL",
        "SLIMLINE_SIGNING_KEY",
        "SLIMLINE_WEBHOOK_SECRET",
    }
    names |= {*QUIET, "PREFECT_HOME", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "HF_HUB_OFFLINE"}
    names |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "THP_MEM_ALLOC_ENABLE"}
    return {
        **{name: os.environ[name] for name in sorted(names & os.environ.keys())},
        "SLIMLINE_HOME": str(settings().home),
    }


def environment(**changes: str | None) -> dict[str, str]:
    """A copy of the environment for a child process, with `changes`; None removes a variable."""
    merged = {**os.environ, **{k: v for k, v in changes.items() if v is not None}}
    return {k: v for k, v in merged.items() if changes.get(k, v) is not None}


def outer(*names: str) -> str | None:
    """The value of the first of these variables that is set: those of libraries, which have no prefix of ours."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def shown(url: str) -> str:
    """The address without the password in it, for people, logs and tags."""
    return re.sub(r"(://[^/@:]*):[^@/]*@", r"\1:***@", url)
