"""Who may do what at a shared MLflow server: trainers run and submit, releasers register and move aliases.

MLflow's permissions are of whole registered models, not of aliases: whoever may register a version may also move
`champion`. So trainers may only read registered models; what they make is signed, submitted and admitted
(`infra.registry.admit`) by a worker with a releaser's account.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlencode

from pydantic import JsonValue

from infra.settings import outer, shown
from infra.tracking import ask, client, every, tracking_uri

Role = Literal["trainer", "releaser"]
WORKSPACE = "default"
TIMEOUT_S = 30.0
GRANTS: dict[Role, dict[str, str]] = {
    "trainer": {"experiment": "EDIT"},
    "releaser": {"experiment": "EDIT", "registered_model": "MANAGE"},  # an alias is deleted by those who manage only
}
"""On all of a kind. What is not granted is as the server's default_permission says."""
ALTERS = ("EDIT", "MANAGE")


def give(accounts: dict[Role, Sequence[str]], models: Sequence[str]) -> list[str]:
    """Give accounts their roles, and see to it that no trainer may alter a registered model; what holds then.

    May be repeated, and has to be when a trainer made a registered model: whoever makes one manages it.

    Args:
        accounts: names by role; they exist.
        models: registered models that are made empty where they do not exist, so that no trainer makes them.

    Raises:
        ValueError: the server has no accounts, one of these does not exist or has two roles, this process's account is
            no admin's, or the server lets everybody alter registered models.
    """
    both = set(accounts["trainer"]) & set(accounts["releaser"])
    for name in both:
        raise ValueError(f"An account is a trainer's or a releaser's; {name} is to be both. Make another account.")
    every = _call("roles/list")["roles"]  # of all workspaces: the admin's to see only
    known = {role["name"]: role for role in every if role["workspace"] == WORKSPACE}
    said = []
    for role, names in accounts.items():
        role_id = int(known[role]["id"]) if role in known else _make(role)
        _grant(role, role_id)
        other = next(each for each in GRANTS if each != role)
        for name in names:
            held = {each["name"] for each in _call("users/roles/list", {"username": name})["roles"]}
            if other in held:
                raise ValueError(f"{name} is a {other} at MLflow. Take that role away there, or name another account.")
            if role not in held:
                _call("roles/assign", body={"username": name, "role_id": role_id})
            said.append(f"{name} is a {role}")
    _make_models(models)
    for name in accounts["trainer"]:
        said += [f"{name} may only read {model}" for model in _let_read_only(name)]
    return said


def _make(role: Role) -> int:
    body: dict[str, JsonValue] = {"name": role, "workspace": WORKSPACE, "description": "made by slimline roles"}
    return int(_call("roles/create", body=body)["role"]["id"])


def _grant(role: Role, role_id: int) -> None:
    there = _call("roles/permissions/list", {"role_id": str(role_id)})["role_permissions"]
    has = {(each["resource_type"], each["resource_pattern"]) for each in there}
    for kind, permission in GRANTS[role].items():
        if (kind, "*") not in has:
            grant: dict[str, JsonValue] = {"resource_type": kind, "resource_pattern": "*", "permission": permission}
            _call("roles/permissions/add", body={"role_id": role_id, **grant})


def _make_models(models: Sequence[str]) -> None:
    there = {model.name for model in every(client().search_registered_models)}
    for model in models:
        if model not in there:
            client().create_registered_model(model)


def _let_read_only(name: str) -> list[str]:
    """Take from an account what it has of its own on registered models; their names."""
    models = [model.name for model in every(client().search_registered_models)]
    for model in models:
        about = {"username": name, "resource_type": "registered_model", "resource_id": model}
        if _call("users/permissions/get", about)["permission"] in ALTERS:
            _call("users/permissions/revoke", body=dict(about), missing_is_fine=True)
            if (left := _call("users/permissions/get", about)["permission"]) in ALTERS:
                raise ValueError(
                    f"A trainer may only read registered models; {name} has {left} on {model}, by another role or the "
                    "server's default_permission. Take that role away, or set default_permission = READ."
                )
    return models


def _call(
    path: str,
    query: dict[str, str] | None = None,
    *,
    body: dict[str, JsonValue] | None = None,
    missing_is_fine: bool = False,
) -> Any:
    """What the server answers, as JSON."""
    uri = tracking_uri()
    if not uri.startswith("http"):
        raise ValueError(
            f"Roles are of an MLflow server with accounts; MLflow here is {uri}. Set SLIMLINE_TRACKING_URI."
        )
    where = f"/api/3.0/mlflow/{path}" + (f"?{urlencode(query)}" if query else "")
    answer = ask(uri, where, body, timeout_s=TIMEOUT_S)
    said = answer.body.strip()[:300]
    if answer.status in (401, 403):
        who = outer("MLFLOW_TRACKING_USERNAME") or "nobody"
        raise ValueError(
            f"Roles are given by MLflow's admin; this is {who}, whom the server refuses ({answer.status}). Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    if answer.status == 404 and (missing_is_fine or "RESOURCE_DOES_NOT_EXIST" not in said):
        if missing_is_fine:
            return {}
        raise ValueError(f"The MLflow server at {shown(uri)} has no accounts: start it with --app-name basic-auth.")
    if answer.status != 200:
        raise ValueError(f"MLflow at {shown(uri)} refuses {path}: {_message(said)}")
    return json.loads(answer.body or "{}")


def _message(said: str) -> str:
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return said
