"""The port that Prometheus scrapes: /metrics of one process, on threads of prometheus_client."""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics.export import MetricReader
from prometheus_client import CollectorRegistry, start_http_server

from mesh.folded_readers import folded
from mesh.folds import Folds
from mesh.process import StartupError


class PrometheusPort:
    """Serves until `close`. `port` is the one it got; 0 asks for any. StartupError: it is taken."""

    def __init__(self, host: str, port: int, folds: Folds) -> None:
        registry = CollectorRegistry()
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise StartupError(
                f"cannot serve metrics on {host}:{port} (--metrics-port): {error.strerror or error}"
            ) from error
        self.port: int = self._server.server_port
        reader = folded(PrometheusMetricReader, folds)
        self.reader: MetricReader = reader(scope_info_enabled=False, registry=registry)

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
