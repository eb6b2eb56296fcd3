"""Finished request -> one OpenTelemetry span, sent to a collector. Imported only if an endpoint is set."""

from __future__ import annotations

import time

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.http.request_context import RequestContext


class TracingError(Exception):
    """Traces cannot be exported; the message is one line for the operator."""


class Tracing:
    """Makes one span of each finished request, with OpenTelemetry's attribute names (`gen_ai.*`)."""

    def __init__(self, exporter: SpanExporter, service_name: str) -> None:
        provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._provider = provider
        self._tracer = provider.get_tracer("chatglm")

    def __call__(self, context: RequestContext, seconds: float) -> None:
        parent = TraceContextTextMapPropagator().extract({"traceparent": context.traceparent or ""})
        end = time.time_ns()
        begin = end - int(seconds * 1e9)
        name = f"{context.method} {context.path}"[:100]
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=begin)
        span.set_attributes(
            {
                "http.request.method": context.method,
                "http.response.status_code": context.status,
                "gen_ai.usage.input_tokens": context.prompt_tokens,
                "gen_ai.usage.output_tokens": context.completion_tokens,
                "gen_ai.response.finish_reasons": context.finish_reasons,
                "chatglm.request_id": context.request_id,
            }
        )
        if context.model is not None:
            span.set_attribute("gen_ai.request.model", context.model)
        if context.first_token_at is not None:
            span.add_event("first token", timestamp=begin + int((context.first_token_at - context.begun) * 1e9))
        if context.error_code:
            span.set_status(Status(StatusCode.ERROR, context.error_code))
        span.end(end)

    def flush(self) -> None:
        """Send the spans that are buffered; call it when the process ends."""
        self._provider.shutdown()


def start_tracing(endpoint: str, service_name: str) -> Tracing:
    """Spans go to `endpoint` by OTLP over HTTP. Raises TracingError when the exporter is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise TracingError("traces need the package opentelemetry-exporter-otlp-proto-http") from None
    return Tracing(OTLPSpanExporter(endpoint), service_name)
