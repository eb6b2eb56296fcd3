"""OpenTelemetry spans of requests, sent to a collector. Off unless an endpoint is set; then one span a request."""

from __future__ import annotations

import time

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.http.request_context import RequestContext


class TracingError(Exception):
    """Traces were asked for and cannot be sent; one line for a person."""


class Tracing:
    """Makes one span of each finished request, in the field's names (OpenTelemetry's `gen_ai.*`)."""

    def __init__(self, exporter: SpanExporter, service_name: str, model: str) -> None:
        provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._provider = provider
        self._tracer = provider.get_tracer("chatglm")
        self._model = model

    def __call__(self, record: RequestContext, seconds: float) -> None:
        parent = TraceContextTextMapPropagator().extract({"traceparent": record.traceparent or ""})
        end = time.time_ns()
        begin = end - int(seconds * 1e9)
        span = self._tracer.start_span(
            f"{record.method} {record.path}"[:100], parent, SpanKind.SERVER, start_time=begin
        )
        span.set_attributes(
            {
                "http.request.method": record.method,
                "http.response.status_code": record.status,
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "gen_ai.response.finish_reasons": record.finish_reasons,
                "chatglm.request_id": record.request_id,
            }
        )
        if record.first_token_at is not None:
            span.add_event("first token", timestamp=begin + int((record.first_token_at - record.begun) * 1e9))
        if record.error_code:
            span.set_status(Status(StatusCode.ERROR, record.error_code))
        span.end(end)

    def flush(self) -> None:
        """Send what is waiting; when the process ends."""
        self._provider.shutdown()


def start_tracing(endpoint: str, service_name: str, model: str) -> Tracing:
    """Spans go to `endpoint` by OTLP over HTTP. Raises TracingError when the exporter is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise TracingError("traces need the package opentelemetry-exporter-otlp-proto-http") from None
    return Tracing(OTLPSpanExporter(endpoint), service_name, model)
