"""Manifests against Kubernetes' own schemas, and the job template as Prefect's worker renders it."""

import asyncio
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
TEMPLATE = KUBERNETES / "workers" / "base-job-template.json"
VERSIONS = ("1.30", "1.33")


def objects() -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in sorted(KUBERNETES.rglob("*.yaml")):
        if file.name not in ("kustomization.yaml", "prefect.yaml"):
            for found in yaml.safe_load_all(file.read_text()):
                yield file, found


OBJECTS = list(objects())
NAMES = {(found["kind"], found["metadata"]["name"]) for _, found in OBJECTS}


def pod_spec(found: dict[str, Any]) -> dict[str, Any]:
    return dict(found["spec"]["template"]["spec"])


PODS = [(found, pod_spec(found)) for _, found in OBJECTS if "template" in found.get("spec", {})]


def identify(value: object) -> str | None:
    return f"{value['kind']}-{value['metadata']['name']}" if isinstance(value, dict) and "kind" in value else None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("found", [found for _, found in OBJECTS], ids=identify)
def test_manifest_keeps_to_the_schema(found, version):
    kubernetes_validate.validate(found, version, strict=True)


def test_schema_refuses_what_is_misspelt():
    found = json.loads(json.dumps(PODS[0][0]))
    found["spec"]["template"]["spec"]["containers"][0]["securityContexts"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="securityContexts"):
        kubernetes_validate.validate(found, VERSIONS[0], strict=True)


@pytest.mark.parametrize(("found", "pod"), PODS, ids=identify)
def test_pods_are_restricted_and_bounded(found, pod):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert found["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] in ("server", "worker")
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        if found["kind"] != "Job" and found["metadata"]["name"] != "prefect-services":
            assert {"startupProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize(("found", "pod"), PODS, ids=identify)
def test_what_a_pod_mounts_and_reads_exists(found, pod):
    claims = {claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", ())}
    volumes = {volume["name"] for volume in pod.get("volumes", ())} | claims
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for source in container["envFrom"]:
            assert ("ConfigMap", source["configMapRef"]["name"]) in NAMES
    maps = {volume["configMap"]["name"] for volume in pod.get("volumes", ()) if "configMap" in volume}
    assert {("ConfigMap", name) for name in maps} <= NAMES | {("ConfigMap", "deployments")}


def test_secrets_are_named_and_not_written():
    text = "\n".join(file.read_text() for file in KUBERNETES.rglob("*") if file.is_file())
    assert not [found for _, found in OBJECTS if found["kind"] == "Secret"]
    assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), "an address with a password in it"
    named = set(re.findall(r"secretName: (\S+?)}", text)) | {"slimline-worker"}
    listed = set(
        re.findall(r"^# +(slimline-\w+)  ", (KUBERNETES / "common/configuration.yaml").read_text(), re.MULTILINE)
    )
    assert named == listed


def test_kustomizations_list_every_file():
    for file in KUBERNETES.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(file.read_text())
        listed = {(file.parent / name).resolve() for name in kustomization["resources"]}
        for generator in kustomization.get("configMapGenerator", ()):
            listed |= {(file.parent / name).resolve() for name in generator["files"]}
        beside = {path for path in file.parent.iterdir() if path.name != file.name}
        assert beside <= listed
        assert all(path.exists() for path in listed)


def test_pools_are_the_project_s_but_for_their_type():
    ours, project = ((path / "prefect.yaml").read_text().splitlines() for path in (KUBERNETES / "workers", ROOT))
    different = [line for line in ours if line not in project]
    assert len(ours) == len(project)
    assert len(different) == 1
    assert "type: kubernetes, base_job_template: base-job-template.json" in different[0]


def test_every_variable_of_the_template_is_used_and_defined():
    template = json.loads(TEMPLATE.read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == template["variables"]["properties"].keys()


def rendered(values: dict[str, Any]) -> dict[str, Any]:
    """The Job that a worker creates for a run of a deployment with these job variables."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # asked for blocks only, and there are none
        template = json.loads(TEMPLATE.read_text())
        job = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, values))
        job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="brave-wolf"))
    return dict(job.job_manifest)


@pytest.mark.parametrize(
    "values",
    [{}, {"gpu_count": 2, "gpu_product": "NVIDIA-H100-80GB-HBM3", "shm_size": "8Gi", "runtime_class": "nvidia"}],
    ids=["defaults", "chosen"],
)
def test_job_template_renders_to_a_valid_job(values):
    job = rendered(values)
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
    pod = pod_spec(job)
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpu_count", 1)
    product = values.get("gpu_product")
    assert pod["nodeSelector"] == ({"nvidia.com/gpu.product": product} if product else {})
    assert {"medium": "Memory", "sizeLimit": values.get("shm_size", "1Gi")} in [
        v.get("emptyDir") for v in pod["volumes"]
    ]
    assert pod["containers"][0]["args"] == ["prefect", "flow-run", "execute"]
    assert pod["securityContext"]["runAsNonRoot"]
