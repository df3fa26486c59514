"""cluster.yaml is what `ray up` accepts, and its GPU workers are spot instances from zero."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schema():
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_matches_rays_schema(cluster, schema):
    jsonschema.validate(cluster, schema)


def test_the_schema_refuses_an_unknown_key(cluster, schema):
    with pytest.raises(jsonschema.ValidationError, match="workers_max"):
        jsonschema.validate({**cluster, "workers_max": 3}, schema)


def test_head_without_gpu_and_spot_workers_from_zero(cluster):
    types = dict(cluster["available_node_types"])
    assert types.pop(cluster["head_node_type"])["resources"]["GPU"] == 0
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert worker["max_workers"] <= cluster["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_images_and_constraints_name_the_same_ray(cluster):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{pins['ray']}-py311")
    assert any(f"torch=={pins['torch']}" in command for command in cluster["setup_commands"])
