import json
from importlib.metadata import version

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from infra.sbom import sbom


def test_the_bill_of_materials_is_cyclonedx_and_names_what_is_installed():
    text = sbom()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    parts = {part["name"]: part for part in found["components"]}
    assert parts["numpy"]["version"] == version("numpy")
    assert parts["numpy"]["purl"] == f"pkg:pypi/numpy@{version('numpy')}"
    assert parts["cryptography"]["licenses"]
    edges = {each["ref"]: each.get("dependsOn", []) for each in found["dependencies"]}
    assert f"pkg:pypi/numpy@{version('numpy')}" in edges[f"pkg:pypi/scipy@{version('scipy')}"]
    assert found["metadata"]["component"]["name"] == "slimline"


def test_what_is_no_cyclonedx_would_be_found():
    changed = json.loads(sbom())
    changed["components"][0]["type"] = "wish"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(changed)) is not None
