"""Prometheus metrics: responses by call and status, latency, queue length, refusals and workers."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.jobs import Counts

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Refusals = Mapping[tuple[str, str, str], int]
"""Number of refusals by (rule, target, code)."""
_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2, 10)  # seconds


class Metrics:
    """Registry of the server's metrics.

    Labels hold no client text; rule names come from the operator's policy.
    """

    def __init__(
        self,
        counts: Callable[[], Counts],
        refusals: Callable[[], Refusals],
        workers: Callable[[], WorkerHealth],
    ) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "skyloom_answers_total",
            "Responses by call and status.",
            ("call", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "skyloom_answer_seconds",
            "Seconds from request to response.",
            ("call",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_QueueCollector(counts, refusals, workers))

    def count(self, call: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._responses.labels(call, str(status)).inc()
        self._seconds.labels(call).observe(seconds)

    def text(self) -> bytes:
        """Render all metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class _QueueCollector(Collector):
    """Queue, refusals and worker processes, read at every scrape."""

    def __init__(
        self,
        counts: Callable[[], Counts],
        refusals: Callable[[], Refusals],
        workers: Callable[[], WorkerHealth],
    ) -> None:
        self._counts = counts
        self._refusals = refusals
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        jobs = GaugeMetricFamily("skyloom_jobs", "Jobs by status.", labels=["status"])
        for status, count in counts.by_status.items():
            jobs.add_metric([status], count)
        yield jobs
        yield GaugeMetricFamily(
            "skyloom_oldest_job_seconds", "Age of the oldest queued job.", counts.oldest_seconds
        )
        yield GaugeMetricFamily(
            "skyloom_workers", "Workers seen in the last minute.", counts.workers
        )
        models = GaugeMetricFamily(
            "skyloom_model_workers", "Workers seen in the last minute by model.", labels=["model"]
        )
        for name, count in counts.models.items():
            models.add_metric([name], count)
        yield models
        yield GaugeMetricFamily(
            "skyloom_worker_restarts",
            "Restarts of the server's own worker processes.",
            self._workers().restarts,
        )
        refused = CounterMetricFamily(
            "skyloom_refusals", "Refusals by policy rule.", labels=("rule", "target", "code")
        )
        for labels, count in self._refusals().items():
            refused.add_metric(labels, count)
        yield refused

    def describe(self) -> list[Metric]:
        return []
