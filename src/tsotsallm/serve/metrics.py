"""Metrics for Prometheus: requests, seconds, tokens, queue, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tsotsallm.machine import rss_bytes
from tsotsallm.serve.guard import App, Message, Receive, Scope, Send
from tsotsallm.serve.served import Models

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counts of one service, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram
        from prometheus_client.core import GaugeMetricFamily

        self.registry = CollectorRegistry()
        self.requests = Counter("tsotsallm_requests", "Requests by path and status.", ["path", "status"],
                                registry=self.registry)
        self.seconds = Histogram("tsotsallm_request_seconds", "Seconds of a request to its last byte.", ["path"],
                                 buckets=BUCKETS, registry=self.registry)
        self.tokens = Counter("tsotsallm_tokens", "Tokens read (prompt) and made (new).", ["model", "kind"],
                              registry=self.registry)

        class Now:
            """Gauges whose values are read when they are collected."""

            def collect(self) -> Iterator[GaugeMetricFamily]:
                memory = GaugeMetricFamily("tsotsallm_resident_memory_bytes", "Memory of the service.")
                memory.add_metric([], rss_bytes())
                yield memory
                for name, about in (("running", "Answers that are being made."), ("waiting", "Questions in the queue.")):
                    gauge = GaugeMetricFamily(f"tsotsallm_{name}", about, labels=["model"])
                    for key, served in models.by_name.items():
                        gauge.add_metric([key], getattr(served.gate, name))
                    yield gauge

        self.registry.register(Now())

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def note(self, model: str, prompt: int, new: int) -> None:
        """Add the tokens of one answer: those of the prompt and new ones."""
        self.tokens.labels(model, "prompt").inc(prompt)
        self.tokens.labels(model, "new").inc(new)


class Counting:
    """Counts every request under the path of its route, so that arbitrary paths create no series of their own."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
