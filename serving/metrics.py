"""The instruments, in the field's names. A leaf: it knows nobody, and every label has a small, fixed set of values.

Gauges are kept per worker process and added up by whoever reads /metrics; those of dead workers do not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # set by BentoML for its workers

SECONDS_TO_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
SECONDS_IN_ALL = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960, 1920)

TIME_TO_FIRST_TOKEN = Histogram(
    "chatglm_time_to_first_token_seconds",
    "From a request's arrival to its first piece of answer.",
    buckets=SECONDS_TO_FIRST,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "chatglm_time_per_output_token_seconds",
    "Mean time between the tokens of one answer after the first.",
    buckets=SECONDS_A_TOKEN,
)
REQUEST_LATENCY = Histogram(
    "chatglm_e2e_request_latency_seconds",
    "From a request's arrival to the end of its answer.",
    buckets=SECONDS_IN_ALL,
)
QUEUE_TIME = Histogram(
    "chatglm_request_queue_time_seconds",
    "From a sequence's arrival at the engine to its first rows in a step.",
    buckets=SECONDS_TO_FIRST,
)
PROMPT_TOKENS = Counter("chatglm_prompt_tokens", "Prompt tokens of the sequences taken on.")
GENERATION_TOKENS = Counter("chatglm_generation_tokens", "Tokens generated.")
PREFIX_QUERIES = Counter("chatglm_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
PREFIX_HITS = Counter("chatglm_prefix_cache_hits", "Prompt tokens found in the prefix cache.")
PREEMPTIONS = Counter("chatglm_num_preemptions", "Sequences that gave up their places to older ones.")
REQUEST_SUCCESS = Counter("chatglm_request_success", "Answers that came to their end.", ["finished_reason"])
ABORTED = Counter("chatglm_aborted_requests", "Requests whose client left before the end.")
ERRORS = Counter("chatglm_request_errors", "Requests that failed, in a status or in a stream.", ["code"])

RUNNING = Gauge("chatglm_num_requests_running", "Sequences being generated.", multiprocess_mode="livesum")
WAITING = Gauge("chatglm_num_requests_waiting", "Sequences waiting for room.", multiprocess_mode="livesum")
IN_FLIGHT = Gauge(
    "chatglm_num_answers_in_flight", "Answers let in and not finished, from the door on.", multiprocess_mode="livesum"
)
KV_USAGE = Gauge(
    "chatglm_kv_cache_usage_ratio", "Share of the key and value cache held by sequences.", multiprocess_mode="livemax"
)
KV_TOKENS_USED = Gauge("chatglm_kv_cache_used_tokens", "Places held by sequences.", multiprocess_mode="livesum")
KV_TOKENS = Gauge("chatglm_kv_cache_tokens", "Places in the key and value cache.", multiprocess_mode="livesum")
READY = Gauge("chatglm_ready", "Workers that take requests.", multiprocess_mode="livesum")

# BentoML's own series, under their own names, but with the route in place of the raw path: theirs grow without bound
HTTP_LABELS = ["endpoint", "http_response_code"]
HTTP_REQUESTS = Counter("bentoml_service_request", "HTTP requests answered.", HTTP_LABELS)
HTTP_SECONDS = Histogram(
    "bentoml_service_request_duration_seconds", "Duration of HTTP requests.", HTTP_LABELS, buckets=SECONDS_IN_ALL
)
HTTP_IN_PROGRESS = Gauge(
    "bentoml_service_request_in_progress", "HTTP requests in progress.", multiprocess_mode="livesum"
)


def names() -> Iterable[str]:
    """Every series' name as Prometheus shows it, without the suffixes of histograms."""
    instruments = [value for value in globals().values() if isinstance(value, Counter | Gauge | Histogram)]
    for instrument in instruments:
        for family in instrument.describe():
            yield family.name + ("_total" if isinstance(instrument, Counter) else "")


def exposition() -> bytes:
    """The text of /metrics, over all workers. Reads files: call it in a thread."""
    if MULTIPROCESS_DIRECTORY not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry)


def forget_dead_workers() -> None:
    """Take the gauges of workers that were killed out of the sums."""
    directory = os.environ.get(MULTIPROCESS_DIRECTORY)
    if directory is None:
        return
    for file in Path(directory).glob("gauge_live*_*.db"):
        pid = file.stem.rsplit("_", 1)[-1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            file.unlink(missing_ok=True)
