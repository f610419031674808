"""Metrics for Prometheus: answers by call and status, how long they took, and the queue at a glance."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.jobs import Counts

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Refusals = Mapping[tuple[str, str, str], int]
"""How often each rule has refused, by rule, target and code."""
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10)


class Metrics:
    """What is counted. No label holds anything that a client wrote; rules are named by the operator."""

    def __init__(
        self,
        counts: Callable[[], Counts],
        refusals: Callable[[], Refusals],
        workers: Callable[[], WorkerHealth],
    ) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "skyloom_answers_total",
            "Answers by call and status.",
            ("call", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "skyloom_answer_seconds",
            "Time to an answer.",
            ("call",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Queue(counts, refusals, workers))

    def count(self, call: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers.labels(call, str(status)).inc()
        self._seconds.labels(call).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Queue(Collector):
    """The queue, what was refused, and the server's own workers, looked at when somebody asks."""

    def __init__(
        self,
        counts: Callable[[], Counts],
        refusals: Callable[[], Refusals],
        workers: Callable[[], WorkerHealth],
    ) -> None:
        self._counts, self._refusals, self._workers = counts, refusals, workers

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        jobs = GaugeMetricFamily("skyloom_jobs", "Jobs by status.", labels=["status"])
        for status, count in counts.by_status.items():
            jobs.add_metric([status], count)
        yield jobs
        yield GaugeMetricFamily(
            "skyloom_oldest_job_seconds", "How long the oldest job waits.", counts.oldest_seconds
        )
        yield GaugeMetricFamily("skyloom_workers", "Workers seen within a minute.", counts.workers)
        restarts = self._workers().restarts
        yield GaugeMetricFamily(
            "skyloom_worker_restarts", "Times that a worker of its own died.", restarts
        )
        labels = ("rule", "target", "code")
        refused = CounterMetricFamily(
            "skyloom_refusals", "What the policy has refused, by rule.", labels=labels
        )
        for told, count in self._refusals().items():
            refused.add_metric(told, count)
        yield refused

    def describe(self) -> list[Metric]:
        return []
