"""A run's progress as metrics of Ray: on its dashboard, and for Prometheus at every node's metrics port."""

from functools import cache

from ray.util.metrics import Gauge

from msif_ray.progress import Snapshot

GAUGES = {
    "msif_documents": "documents done",
    "msif_documents_total": "documents of the step",
    "msif_documents_skipped": "documents that could not be used",
    "msif_tokens": "tokens done",
    "msif_tokens_per_second": "tokens per second since the step began",
    "msif_seconds_left": "seconds that the step will take, at its rate so far",
    "msif_replicas": "replicas at work",
}


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, description=GAUGES[name], tag_keys=("step",))


def publish(now: Snapshot) -> None:
    """Sets the metrics of a step; what is not known is left as it was. Ray must be initialised."""
    values = {
        "msif_documents": now.documents,
        "msif_documents_total": now.total,
        "msif_documents_skipped": now.skipped,
        "msif_tokens": now.tokens,
        "msif_tokens_per_second": now.tokens_per_second,
        "msif_seconds_left": 0.0 if now.total is not None and now.done >= now.total else now.seconds_left,
        "msif_replicas": now.replicas,
    }
    for name, value in values.items():
        if value is not None:
            _gauge(name).set(value, tags={"step": now.name})
