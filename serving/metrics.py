"""Prometheus metrics of the server, named as vLLM names its own, and the text of /metrics over all workers.

Every label has a small, fixed set of values. Each worker has gauges of its own, which /metrics adds up; those of dead
workers do not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from serving.shared_folder import MULTIPROCESS_DIRECTORY, shared_folder

# BentoML sets it to one folder for all services under one home, which each service empties when it starts
if MULTIPROCESS_DIRECTORY in os.environ and (folder := shared_folder()) is not None:
    os.environ[MULTIPROCESS_DIRECTORY] = str(folder)

MODEL = ["model"]  # the name of a served model, of which there are as many as the settings name
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960, 1920)

TIME_TO_FIRST_TOKEN = Histogram(
    "chatglm_time_to_first_token_seconds",
    "Seconds from a request to its first token.",
    MODEL,
    buckets=FIRST_TOKEN_BUCKETS,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "chatglm_time_per_output_token_seconds", "Mean seconds per token after the first.", MODEL, buckets=TOKEN_BUCKETS
)
REQUEST_LATENCY = Histogram(
    "chatglm_e2e_request_latency_seconds", "Seconds from a request to its last token.", MODEL, buckets=REQUEST_BUCKETS
)
QUEUE_TIME = Histogram(
    "chatglm_request_queue_time_seconds",
    "Seconds that a sequence waits for its first step.",
    MODEL,
    buckets=FIRST_TOKEN_BUCKETS,
)
PROMPT_TOKENS = Counter("chatglm_prompt_tokens", "Prompt tokens of the sequences that the engine has started.", MODEL)
GENERATION_TOKENS = Counter("chatglm_generation_tokens", "Generated tokens.", MODEL)
PREFIX_QUERIES = Counter("chatglm_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", MODEL)
PREFIX_HITS = Counter("chatglm_prefix_cache_hits", "Prompt tokens found in the prefix cache.", MODEL)
PREEMPTIONS = Counter("chatglm_num_preemptions", "Sequences preempted because the KV cache was full.", MODEL)
REQUEST_SUCCESS = Counter("chatglm_request_success", "Completed answers by finish reason.", [*MODEL, "finished_reason"])
ABORTED = Counter("chatglm_aborted_requests", "Requests whose client disconnected before the end of the response.")
ERRORS = Counter("chatglm_request_errors", "Failed requests by error code, including errors within a stream.", ["code"])

SummedGauge = partial(Gauge, multiprocess_mode="livesum")  # over the living workers
RUNNING = SummedGauge("chatglm_num_requests_running", "Sequences that are running.", MODEL)
WAITING = SummedGauge("chatglm_num_requests_waiting", "Sequences that wait to be scheduled.", MODEL)
IN_FLIGHT = SummedGauge("chatglm_num_answers_in_flight", "Answers admitted and not finished, queued ones included.")
KV_TOKENS_USED = SummedGauge("chatglm_kv_cache_used_tokens", "KV-cache tokens in use by sequences.", MODEL)
KV_TOKENS_CACHED = SummedGauge(
    "chatglm_kv_cache_cached_tokens", "KV-cache tokens that hold a known prefix and belong to no sequence.", MODEL
)
KV_TOKENS = SummedGauge("chatglm_kv_cache_tokens", "Size of the KV cache in tokens.", MODEL)
KV_USAGE = Gauge("chatglm_kv_cache_usage_ratio", "Fraction of the KV cache in use.", MODEL, multiprocess_mode="livemax")
LOADED = SummedGauge("chatglm_model_loaded", "Workers that have this model in memory.", MODEL)
READY = SummedGauge("chatglm_ready", "Workers that are ready for requests.")

# under the names of BentoML's own metrics, but labelled with the route: BentoML's label is the raw path, of which there
# are as many as clients send
HTTP_LABELS = ["endpoint", "http_response_code"]
HTTP_REQUESTS = Counter("bentoml_service_request", "HTTP requests by route and status.", HTTP_LABELS)
HTTP_SECONDS = Histogram(
    "bentoml_service_request_duration_seconds", "Seconds per HTTP request.", HTTP_LABELS, buckets=REQUEST_BUCKETS
)
HTTP_IN_PROGRESS = SummedGauge("bentoml_service_request_in_progress", "HTTP requests in progress.")


def begin(models: Iterable[str]) -> None:
    """Make every series of these models, so that a rate is right from its first count on. Called once in a worker."""
    for metric in (
        TIME_TO_FIRST_TOKEN, TIME_PER_OUTPUT_TOKEN, REQUEST_LATENCY, QUEUE_TIME, PROMPT_TOKENS, GENERATION_TOKENS,
        PREFIX_QUERIES, PREFIX_HITS, PREEMPTIONS, RUNNING, WAITING, KV_TOKENS_USED, KV_TOKENS_CACHED, KV_TOKENS,
        KV_USAGE, LOADED,
    ):  # fmt: skip
        for model in models:
            metric.labels(model)


def exposition() -> bytes:
    """The text of /metrics over all workers. Reads files: call it in a thread."""
    if MULTIPROCESS_DIRECTORY not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry)


def forget_dead_workers() -> None:
    """Delete the gauges of workers that were killed, so that they are not added up."""
    directory = os.environ.get(MULTIPROCESS_DIRECTORY)
    if directory is None:
        return
    for file in Path(directory).glob("gauge_live*_*.db"):
        pid = file.stem.rsplit("_", 1)[-1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            file.unlink(missing_ok=True)  # mark_process_dead() fails if another worker does the same
