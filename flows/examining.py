"""What happens to candidates by itself: trainers' submissions are registered, and every candidate is examined once.

MLflow's webhooks start `examine` for a new candidate (infra/bridge.py); `reconcile` finds what they missed.
"""

from prefect import flow

from infra.console import console
from infra.registry import admit, candidates, note, verified_version
from infra.signing import Unverified

EXAMINED, PASSED = "examined", "passed"
"""Tag of a version: what came of it."""


@flow(name="examine", flow_run_name="examine-{model}-{version}", persist_result=False)
def examine(model: str, version: str) -> str:
    """Verify a candidate's signature and every byte, and note in MLflow what came of it.

    Args:
        model: Name of the registered model.
        version: Its number.

    Raises:
        ValueError: there is no such version.
        Unverified: it must not be used.
    """
    try:
        verified_version(model, version)
    except Unverified as error:
        note(model, version, {EXAMINED: f"failed: {error}"[:5000]})
        raise
    note(model, version, {EXAMINED: PASSED})
    console.print(f"version {version} of {model} is as it was signed", markup=False)
    return PASSED


@flow(name="reconcile", persist_result=False)
def reconcile() -> dict[str, str]:
    """Register what was submitted, and examine candidates that nobody examined; what came of each, by its URI.

    Raises:
        Unverified: at least one of them must not be used; the others are done.
    """
    found, refused = {}, []
    try:
        for made in admit():
            found[f"models:/{made.model}/{made.version}"] = "registered"
    except Unverified as error:
        refused.append(str(error))
    for model, version, tags in candidates():
        if EXAMINED in tags:
            continue
        try:
            found[f"models:/{model}/{version}"] = examine.fn(model, version)
        except Unverified as error:
            refused.append(str(error))
    if refused:
        raise Unverified(" ".join(refused))
    return found
