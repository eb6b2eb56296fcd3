"""POST /completions: raw prompts -> generations -> one completion or a stream."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving.generation.interface import IndexedEvent
from serving.generation.pipeline import CompletionJob, RunningModel
from serving.openai.common import Api, Operation, build_prompt, chunk_options, large_json_response
from serving.openai.completions.request import CompletionRequest, to_completion_jobs
from serving.openai.completions.response import Completion, CompletionStream, PromptChoices, to_text_completion
from serving.openai.streaming import begin_stream, collect


async def create(api: Api, request: Request) -> Response:
    """Continue raw prompts."""
    body = await api.parse(request, CompletionRequest)
    model = await api.generations.chat_model(request, body.model, body.stream)
    jobs = to_completion_jobs(body, api.limits.max_n)
    choices = PromptChoices(body.n, tuple(_echo(job, model) for job in jobs))
    envelope = api.envelope("cmpl", body.model)
    options = chunk_options(body, body.logprobs is not None)
    token_bytes = model.chat_format.token_bytes
    num_answers = max(jobs[0].n, jobs[0].best_of)  # of each prompt; more than n when the best are to be kept
    with api.generations.admit(request, model, num_answers * len(jobs)) as admitted:
        prompts = [await build_prompt(model, job) for job in jobs]
        events = admitted.open(prompts)
    if body.stream:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        chunks = CompletionStream(choices, envelope, options, token_bytes, lengths)
        return await begin_stream(events, chunks, request, api.limits)
    per_prompt: list[list[IndexedEvent]] = [[] for _ in prompts]
    collected = await collect(events, request)
    for index, event in collected:
        per_prompt[index // num_answers].append((index % num_answers, event))
    return await large_json_response(
        lambda: to_text_completion(per_prompt, choices, envelope, options, token_bytes), len(collected)
    )


def _echo(job: CompletionJob, model: RunningModel) -> str:
    if not job.echo:
        return ""
    return job.prompt if isinstance(job.prompt, str) else model.chat_format.decode(job.prompt)


OPERATIONS = (Operation("post", "/completions", "createCompletion", create, Completion, CompletionRequest, Completion),)
