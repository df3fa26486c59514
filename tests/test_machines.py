"""Whether a run has GPUs, and room for its first replicas, is known before it asks for them."""

import pytest
import torch

from msif_ray import connection
from msif_ray.config import Cluster
from msif_ray.errors import UserError
from msif_ray.machines import cluster_address


def decide(monkeypatch: pytest.MonkeyPatch, address: str | None, cpus: float, gpus: float, **keys: object) -> Cluster:
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    monkeypatch.setattr(connection.ray, "cluster_resources", lambda: resources)
    return connection.decide_gpus(Cluster.model_validate(keys))


@pytest.mark.parametrize(("address", "gpus", "decided"), [(None, 0, 0), (None, 2, 1), ("host:6379", 1, 1)])
def test_gpus_left_out_are_used_where_they_are(
    monkeypatch: pytest.MonkeyPatch, address: str | None, gpus: float, decided: float
) -> None:
    assert decide(monkeypatch, address, 2, gpus).gpus_per_rank == decided


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto"])
def test_a_cluster_without_a_gpu_now_does_not_mean_cpus(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(UserError, match=r"^cluster\.gpus_per_rank: .*set it to 1 .*or to 0"):
        decide(monkeypatch, address, 8, 0)
    assert decide(monkeypatch, address, 8, 0, gpus_per_rank=0).gpus_per_rank == 0
    # More than is there now: the autoscaler's to bring
    assert decide(monkeypatch, address, 0, 0, gpus_per_rank=1, replicas=9).gpus_per_rank == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cpus_per_rank": 64}, r"cluster\.cpus_per_rank: a replica needs 64 cores .*this machine has 2"),
        ({"ranks_per_replica": 3}, r"cluster\.cpus_per_rank: a replica needs 3 cores .*ranks_per_replica: 3"),
        ({"replicas": 9}, r"cluster\.replicas\.min: 9 replicas need 9 cores, .*has 2; set it to 2"),
        ({"gpus_per_rank": 2}, r"cluster\.gpus_per_rank: a replica needs 2 GPUs .*has 1"),
        ({"replicas": 2}, r"cluster\.replicas\.min: 2 replicas need 2 GPUs, .*has 1; set it to 1"),
    ],
)
def test_what_could_never_start_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        decide(monkeypatch, None, 2, 1, **keys)


def test_a_minimum_that_fits_and_a_larger_maximum_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, None, 2, 0, replicas={"min": 2, "max": 16}).gpus_per_rank == 0


@pytest.mark.parametrize(("address", "named"), [("", None), ("local", None), ("auto", "auto"), ("h:1", "h:1")])
def test_an_empty_address_is_a_local_cluster(monkeypatch: pytest.MonkeyPatch, address: str, named: str | None) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() == named


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nonsense", "host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: no Ray cluster answers at ") as error, connection.connected():
        pass
    assert address in str(error.value) and "\n" not in str(error.value)


def test_the_plan_decides_as_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from msif_ray.plan.make import decided

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match=r"^cluster\.gpus_per_rank: "):
        decided(Cluster())
    monkeypatch.delenv("RAY_ADDRESS")
    assert decided(Cluster()).gpus_per_rank == 0
