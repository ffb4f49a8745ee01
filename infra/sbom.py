"""What software made a version: a bill of materials (SBOM) of the environment, as CycloneDX 1.6 in JSON."""

import platform
from functools import cache
from importlib.metadata import Distribution, distributions, version

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

SBOM = "sbom.cdx.json"
LONGEST_LICENSE = 100
"""Characters; what is longer in a distribution's metadata is the text of its license, not the name."""


@cache
def sbom() -> str:
    """Every installed distribution with its version, license and what it requires, and the Python that ran."""
    found = {canonicalize_name(each.name): each for each in distributions()}
    components = {name: _component(each) for name, each in found.items()}
    interpreter = Component(
        name=platform.python_implementation(), version=platform.python_version(), type=ComponentType.PLATFORM
    )
    bom = Bom(components=[interpreter, *components.values()])
    bom.metadata.component = Component(name="slimline", version=version("slimline"), type=ComponentType.APPLICATION)
    bom.register_dependency(bom.metadata.component, [interpreter, *components.values()])
    for name, each in found.items():
        required = {canonicalize_name(requirement) for requirement in _required(each)} - {name}
        bom.register_dependency(components[name], [components[other] for other in required & components.keys()])
    return str(JsonV1Dot6(bom).output_as_string(indent=1))


def _component(found: Distribution) -> Component:
    about = found.metadata.json
    text = str(about.get("license_expression") or about.get("license") or "").strip()
    named = text if "\n" not in text and len(text) <= LONGEST_LICENSE else ""
    purl = PackageURL("pypi", name=canonicalize_name(found.name), version=found.version)
    return Component(
        name=found.name,
        version=found.version,
        type=ComponentType.LIBRARY,
        purl=purl,
        bom_ref=purl.to_string(),
        licenses=[LicenseFactory().make_from_string(named)] if named else [],
    )


def _required(found: Distribution) -> list[str]:
    """The names of what it requires here, without extras."""
    names = []
    for text in found.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of an old distribution; pip leaves it out as well
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names.append(requirement.name)
    return names
