"""Each row is sampled from the distribution of its request's parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import decoder_native, native_library
from serving.engine.interface import SamplingParams
from serving.engine.native.sampler import NUM_CANDIDATES, Draw, Sampler
from serving.engine.native.sequence import SequenceState


def sequence(
    sampling: SamplingParams, seed: int = 0, token_ids: tuple[int, ...] = (1,), answer: tuple[int, ...] = ()
) -> SequenceState:
    made = SequenceState(list(token_ids), sampling, seed=seed)
    made.token_ids += answer
    return made


def allowed_by_sorting(logits: torch.Tensor, sampling: SamplingParams) -> set[int]:
    """The textbook: temperature, then top_k, then top_p of what is left, then min_p."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    order = probabilities.argsort(descending=True, stable=True).tolist()
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = sum(float(probabilities[i]) for i in order)
    kept: list[int] = []
    before = 0.0
    for i in order:
        if kept and (before >= sampling.top_p * mass or probabilities[i] < sampling.min_p * probabilities[order[0]]):
            break
        kept.append(i)
        before += float(probabilities[i])
    return set(kept)


def draw_many(logits: torch.Tensor, sampling: SamplingParams, count: int) -> list[int]:
    sampler = Sampler(logits.shape[0], torch.device("cpu"))
    rows = [sequence(sampling, seed=seed) for seed in range(count)]
    drawn = sampler.sample(logits.expand(count, -1), rows)
    return [one.token_id for one in drawn if one.token_id is not None]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.2, 0.95, 2.0]),
    st.sampled_from([0.0, 0.3, 0.7, 0.999, 1.0]),
    st.sampled_from([0, 1, 5, 300, 100_000]),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([40, 600]),
)
def test_only_what_the_settings_allow_is_drawn(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float, vocabulary: int
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    sampling = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    allowed = allowed_by_sorting(logits, sampling)
    drawn = set(draw_many(logits, sampling, 200))
    # rounding may move the border of top_p by one token
    borderline = allowed_by_sorting(
        logits, SamplingParams(1, temperature, min(1.0, top_p + 1e-6), top_k, min_p=max(0, min_p - 1e-6))
    )
    assert drawn <= allowed | borderline


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_are_the_probabilities(top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=top_p)
    drawn = draw_many(logits, sampling, 20_000)
    kept = sorted(allowed_by_sorting(logits, sampling))
    expected = logits[kept].softmax(-1)
    for i, token in enumerate(kept):
        share = drawn.count(token) / len(drawn)
        assert abs(share - float(expected[i])) < 5 * math.sqrt(0.25 / len(drawn))


def test_a_flat_distribution_reaches_behind_the_first_candidates() -> None:
    logits = torch.zeros(4 * NUM_CANDIDATES)
    drawn = draw_many(logits, SamplingParams(max_tokens=1, temperature=1.0), 2000)
    assert len(set(drawn)) > 2 * NUM_CANDIDATES


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [(1.0, 0, 0.0), (0.95, 0, 0.0), (0.9, 900, 0.0), (1.0, 0, 0.01)])
def test_sorting_whole_rows_and_counting_them_into_bins_draw_the_same(top_p: float, top_k: int, min_p: float) -> None:
    """A GPU sorts what a CPU counts."""
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(5))
    sampling = SamplingParams(max_tokens=1, temperature=2.0, top_p=top_p, top_k=top_k, min_p=min_p)
    draw = Draw(logits, [sequence(sampling, seed=seed) for seed in range(64)], is_native=False)
    rows = list(range(64))
    assert [*draw.settle(rows).values()] == draw._sorted(rows)  # private: only a GPU takes this way by itself
    settled = draw.is_settled.nonzero()[:, 0].tolist()
    assert [draw.chosen.tolist()[row] for row in settled] == [draw.settle(rows)[row] for row in settled]
    assert len(settled) < 64


BUILDS = [each.name for each in native_library.usable() if native_library.path_of(each.name).exists()]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["normal", "peaked", "flat", "equal", "masked"]),
    st.sampled_from([1e-6, 0.2, 0.95, 2.0]),
    st.sampled_from([0.0, 0.3, 0.7, 0.999, 1.0]),
    st.sampled_from([0, 1, 5, 300, 100_000]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([1, 3, 40, 3000]),
)
def test_the_compiled_kernel_draws_what_sorting_draws(
    seed: int, kind: str, temperature: float, top_p: float, top_k: int, min_p: float, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, vocabulary, generator=generator)
    logits *= {"peaked": 20, "flat": 0.01, "equal": 0}.get(kind, 2)
    if kind == "masked":
        logits[:, torch.rand(vocabulary, generator=generator) < 0.5] = -torch.inf
        logits[:, 0] = 0
    sampling = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    rows = [sequence(sampling, seed=seed + row) for row in range(8)]
    plain = Draw(logits, rows, is_native=False)
    expected = plain._sorted(list(range(8)))
    numbers = torch.tensor(plain._settings, dtype=torch.float64)
    for build in BUILDS:
        library = decoder_native.functions(build)
        assert library is not None
        got = decoder_native.sample(logits, numbers, library).tolist()
        # where the running mass and the draw are equal up to rounding, the neighbour may be taken
        assert sum(a != b for a, b in zip(got, expected, strict=True)) <= (1 if kind in ("flat", "normal") else 0)


def test_top_p_zero_and_temperature_zero_take_the_most_likely() -> None:
    logits = torch.randn(500)
    best = int(logits.argmax())
    assert set(draw_many(logits, SamplingParams(1, temperature=2.0, top_p=0.0), 50)) == {best}
    assert set(draw_many(logits, SamplingParams(1, temperature=0.0), 5)) == {best}
    assert set(draw_many(logits, SamplingParams(1, temperature=1e-300), 5)) == {best}


def test_rows_with_numbers_that_are_not_finite_fail_alone() -> None:
    logits = torch.randn(4, 50)
    logits[1, 3] = float("nan")
    logits[2, 7] = float("inf")
    sampler = Sampler(50, torch.device("cpu"))
    drawn = sampler.sample(logits, [sequence(SamplingParams(1, temperature=t)) for t in (1.0, 1.0, 0.0, 0.0)])
    assert [one.token_id is None for one in drawn] == [False, True, True, False]


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    logits = torch.zeros(1, 60)
    logits[0, 55] = 100
    sampler = Sampler(50, torch.device("cpu"))
    assert sampler.sample(logits, [sequence(SamplingParams(1, temperature=0))])[0].token_id == 0


def test_penalties_and_bias_count_what_they_say() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 4], logits[0, 5], logits[0, 6] = 3.0, 2.9, 2.0
    sampler = Sampler(10, torch.device("cpu"))

    def best(sampling: SamplingParams, answer: tuple[int, ...] = (), prompt: tuple[int, ...] = (1,)) -> int | None:
        return sampler.sample(logits, [sequence(sampling, token_ids=prompt, answer=answer)])[0].token_id

    assert best(SamplingParams(1, temperature=0)) == 4
    assert best(SamplingParams(1, temperature=0, presence_penalty=0.5), answer=(4,)) == 5
    assert best(SamplingParams(1, temperature=0, presence_penalty=0.5), prompt=(4,)) == 4  # answers only
    assert best(SamplingParams(1, temperature=0, frequency_penalty=0.3), answer=(4, 5, 4, 5, 4, 5, 4, 5)) == 6
    assert best(SamplingParams(1, temperature=0, repetition_penalty=2.0), prompt=(4, 5)) == 6
    assert best(SamplingParams(1, temperature=0, logit_bias=((9, 50.0),))) == 9
    assert best(SamplingParams(1, temperature=0, stop_token_ids=frozenset([4]), min_tokens=3)) == 5
