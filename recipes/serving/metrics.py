"""What `/metrics` shows, in Prometheus' format. No texts, no pictures, no addresses."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from vqguard.safety_map import Verdict

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "vqguard_requests", "Requests answered", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "vqguard_request_seconds",
            "From a request's arrival to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.shed = Counter(
            "vqguard_shed", "Requests sent away because too many wait", registry=self.registry
        )
        self.served = Gauge(
            "vqguard_requests_served", "Requests served or waiting now", registry=self.registry
        )
        self.waiting = Gauge(
            "vqguard_jobs_waiting", "Jobs waiting for the model now", registry=self.registry
        )
        self.batch = Histogram(
            "vqguard_batch_jobs", "Jobs done together", buckets=_BATCHES, registry=self.registry
        )
        self.tokens = Counter("vqguard_answer_tokens", "Tokens answered", registry=self.registry)
        self.verdicts = Counter(
            "vqguard_verdicts",
            "Pictures judged",
            ["category", "action"],
            registry=self.registry,
        )

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """Count verdicts."""
        for verdict in verdicts:
            self.verdicts.labels(verdict.category, verdict.action).inc()

    def page(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self.registry)
