"""The cluster files are what Ray accepts: spot GPU workers from zero, this package, one token for all nodes."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
LAUNCHED = {"aws": "cluster.yaml", "gcp": "docs/cluster-gcp.yaml"}


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def is_spot(provider: str, node: dict[str, Any]) -> bool:
    if provider == "aws":
        return bool(node["InstanceMarketOptions"]["MarketType"] == "spot")
    return bool(node["scheduling"]["provisioningModel"] == "SPOT")


@pytest.fixture(params=LAUNCHED)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(provider: str) -> Any:
    return read(LAUNCHED[provider])


@pytest.fixture(scope="module")
def schema() -> Any:
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_matches_rays_schema(cluster: Any, schema: Any) -> None:
    jsonschema.validate(cluster, schema)


def test_the_schema_refuses_an_unknown_key(cluster: Any, schema: Any) -> None:
    with pytest.raises(jsonschema.ValidationError, match="workers_max"):
        jsonschema.validate({**cluster, "workers_max": 3}, schema)


def test_ray_up_accepts_it_with_its_defaults_filled_in(provider: str, cluster: Any) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["provider"]["type"] == provider
    # `ray up` runs these on every node; the worker's must not lack the installation.
    assert set(cluster["setup_commands"]) <= set(prepared["worker_setup_commands"])


def test_ray_up_refuses_a_head_that_is_no_node_type(cluster: Any) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config({**cluster, "head_node_type": "haed"}))


def test_head_without_gpu_and_spot_workers_from_zero(provider: str, cluster: Any) -> None:
    types = dict(cluster["available_node_types"])
    assert types.pop(cluster["head_node_type"])["resources"]["GPU"] == 0
    for worker in types.values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= cluster["max_workers"]
        assert is_spot(provider, worker["node_config"])


def test_every_node_may_use_the_bucket(provider: str, cluster: Any) -> None:
    types = copy.deepcopy(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])["node_config"]
    workers = [worker["node_config"] for worker in types.values()]
    if provider == "aws":
        assert all(node["IamInstanceProfile"] == {"Name": "msif-ray"} for node in (head, *workers))
    else:  # Ray gives the head this account
        project = cluster["provider"]["project_id"]
        accounts = [account["email"] for node in workers for account in node["serviceAccounts"]]
        assert accounts == [f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"] * len(workers)


def test_images_and_constraints_name_the_same_ray(cluster: Any) -> None:
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{pins()['ray']}-py311")
    assert any(f"torch=={pins()['torch']}" in command for command in cluster["setup_commands"])


def test_every_node_gets_the_token_and_asks_for_it(cluster: Any) -> None:
    assert cluster["file_mounts"]["/home/ray/.ray"] == "~/.ray"
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


def test_both_clusters_install_the_same() -> None:
    aws, gcp = (read(path) for path in LAUNCHED.values())
    for key in ("docker", "file_mounts", "rsync_exclude", "setup_commands", "head_start_ray_commands"):
        assert aws[key] == gcp[key]
    assert aws["worker_start_ray_commands"] == gcp["worker_start_ray_commands"]


@pytest.fixture(scope="module")
def job() -> Any:
    return read("docs/rayjob.yaml")


def test_the_job_runs_the_command_of_the_readme(job: Any) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert job["spec"]["entrypoint"] == "python /mnt/shared/msif_ray/jobs/attribute.py /mnt/shared/run.yaml"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


def test_all_of_the_entrypoint_is_submitted(job: Any) -> None:
    """KubeRay's submitter runs `bash -ce` on a line that it joins of words, the entrypoint as it is among them."""
    line = (
        f'ray() {{ printf "%s " "$@"; }}; if true ; then ray job submit -- {job["spec"]["entrypoint"]} ; fi ; ray logs'
    )
    submitted = subprocess.run(["bash", "-ce", line], capture_output=True, text=True)
    assert (submitted.stdout, submitted.stderr) == (f"job submit -- {job['spec']['entrypoint']} logs ", "")


def test_the_jobs_workers_are_spot_gpus_from_zero(job: Any) -> None:
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 <= group["replicas"] <= group["maxReplicas"] and group["maxReplicas"] > 0
        assert re.fullmatch(r"[a-z0-9-]+", group["groupName"]) and group["rayStartParams"] == {}
        pod = group["template"]["spec"]
        assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        tolerated = {toleration["key"]: toleration["effect"] for toleration in pod["tolerations"]}
        assert tolerated == {"cloud.google.com/gke-spot": "NoSchedule", "nvidia.com/gpu": "NoSchedule"}
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_jobs_nodes_install_this_package_on_the_pinned_ray(job: Any) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pins()["ray"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert container["image"].startswith(f"rayproject/ray:{pins()['ray']}-py311")
        (command,) = container["args"]
        assert f"pip install -c constraints.txt torch=={pins()['torch']} ." in command
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == mounted and "shared" in mounted
