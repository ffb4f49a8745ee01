"""What happens in MLflow's registry, told to Prefect: MLflow's webhooks come in, events of Prefect's go out.

MLflow signs what it sends (HMAC-SHA256 with SLIMLINE_WEBHOOK_SECRET) and tries a few times only, so what was missed is
found by the flow `reconcile`. The event has the delivery's id: one that is delivered twice is one event.
"""

import base64
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client

from infra.listening import listening
from infra.settings import settings

logger = logging.getLogger(__name__)

TOLERANCE_S = 300
"""A delivery that is older was recorded and is sent again by somebody else, or the clocks differ."""
LONGEST_BYTES = 2**20
WEBHOOK = "slimline"
TOLD = ("model_version.created", "model_version_alias.created", "model_version_alias.deleted")
EXAMPLE = "example_model"
"""Of the deliveries that MLflow's button Test sends."""


def secret() -> str:
    """What deliveries are signed with.

    Raises:
        ValueError: it is not set.
    """
    found = settings().webhook_secret
    if found is None:
        raise ValueError(
            "MLflow's deliveries must be signed; SLIMLINE_WEBHOOK_SECRET is not set. Set it to a random text, for the "
            "bridge and for `slimline webhook`."
        )
    return found.get_secret_value()


def delivery_id(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> str:
    """The id of a delivery that MLflow signed.

    Raises:
        PermissionError: it did not, or long ago.
    """
    found, sent_at, signature = (
        headers.get(f"x-mlflow-{name}", "") for name in ("delivery-id", "timestamp", "signature")
    )
    if not sent_at.isdecimal() or abs(now - int(sent_at)) > TOLERANCE_S:
        raise PermissionError(f"A delivery must be at most {TOLERANCE_S} s old; got the time {sent_at[:20]!r}.")
    mac = hmac.new(secret.encode(), f"{found}.{sent_at}.".encode() + body, hashlib.sha256).digest()
    if not hmac.compare_digest(f"v1,{base64.b64encode(mac).decode()}".encode(), signature.encode()):
        raise PermissionError("A delivery must be signed with SLIMLINE_WEBHOOK_SECRET; this one is not.")
    return found


def as_event(delivery: str, body: bytes) -> Event | None:
    """What to tell Prefect; None for MLflow's own tries.

    Raises:
        ValueError: it is nothing that MLflow sends.
    """
    try:
        content = json.loads(body)
        name, data = f"mlflow.{content['entity']}.{content['action']}", content["data"]
        model = str(data["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"A delivery must be an event of MLflow's registry; it lacks {error}.") from None
    if model == EXAMPLE:
        return None
    about = {f"mlflow.{label}": str(data[label]) for label in ("alias", "version") if label in data}
    return Event(
        id=uuid.uuid5(uuid.NAMESPACE_URL, delivery),
        event=name,
        resource=Resource({"prefect.resource.id": f"mlflow.registered-model.{model}", **about}),
        payload={"name": model, **{label: str(data[label]) for label in ("alias", "version") if label in data}},
    )


def build(secret: str) -> FastAPI:
    """The application: POST / takes deliveries, GET /health says that it lives."""
    app = FastAPI(title="Slimline's bridge", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/")
    async def receive(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LONGEST_BYTES:
                raise HTTPException(413, f"A delivery must have at most {LONGEST_BYTES} bytes.")
        try:
            event = as_event(delivery_id(request.headers, body, secret, time.time()), body)
        except PermissionError as error:
            logger.warning("refused: %s", error)
            raise HTTPException(401, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if event is not None:
            try:
                await tell(event)
            except Exception as error:  # noqa: BLE001 - whatever it is: MLflow sends it again
                logger.warning("Prefect could not be told of %s: %s", event.event, error)
                raise HTTPException(502, "Prefect could not be told; send it again.") from None
            logger.info("told Prefect: %s %s", event.event, event.payload)
        return Response(status_code=204)

    return app


async def tell(event: Event) -> None:
    """Has Prefect's server take the event."""
    async with get_events_client(reconnection_attempts=2, checkpoint_every=1) as events:
        await events.emit(event)


def run(host: str, port: int, secret: str) -> None:
    """Serves until it is interrupted.

    Raises:
        OSError: the port is taken.
    """
    with listening(host, port) as listener, suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(build(secret), log_level="warning")).run(sockets=[listener])


def webhook_of(url: str) -> dict[str, Any]:
    """What MLflow is asked to send, and where."""
    return {"name": WEBHOOK, "url": url, "events": list(TOLD), "secret": secret()}
