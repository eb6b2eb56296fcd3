"""Logits -> one token a row, vectorised over the batch, with each row's own sampling parameters and random numbers.

A row's random number is a function of its seed and of the position it is drawn for, so the same logits give the same
token whatever else is in the batch, and again after a preemption.

All work is enqueued before anything is read back: a batch waits for a GPU once, when its tokens are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import decoder_native
from serving.engine.native.device import is_out_of_memory, numbers_to_device, to_device
from serving.engine.native.sequence import SequenceState
from serving.engine.outputs import TokenLogprob
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

NUM_CANDIDATES = 256  # most likely tokens considered first; rows whose top_p or top_k needs more use the whole row


@dataclass(frozen=True)
class SampledToken:
    """The result of one row. `token_id` is None if the logits were not finite or the row failed."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    is_fault: bool = False  # sampling raised for this row alone


class TokenCounts:
    """How often each token occurs in a sequence, for penalties: [vocabulary] int32, prompt and answer apart."""

    def __init__(self, sequence: SequenceState, num_tokens: int, device: torch.device) -> None:
        self._num_prompt_tokens = sequence.num_prompt_tokens
        self._num_counted = sequence.num_trained  # placeholders are no tokens
        self.prompt = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        self.answer = torch.zeros(num_tokens, dtype=torch.int32, device=device)

    def update(self, token_ids: list[int]) -> None:
        fresh = token_ids[self._num_counted :]
        split = max(0, self._num_prompt_tokens - self._num_counted)
        for counts, ids in ((self.prompt, fresh[:split]), (self.answer, fresh[split:])):
            if known := [token_id for token_id in ids if token_id < counts.shape[0]]:
                indices = numbers_to_device(known, counts.device)
                counts.index_add_(0, indices, torch.ones_like(indices, dtype=torch.int32))
        self._num_counted = len(token_ids)


class Sampler:
    """Chooses the next token of each sequence. Holds penalty counts of the sequences that need them."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self._device = device
        self._counts: dict[SequenceState, TokenCounts] = {}

    def forget(self, sequence: SequenceState) -> None:
        self._counts.pop(sequence, None)

    def sample(self, logits: Tensor, sequences: list[SequenceState]) -> list[SampledToken]:
        """logits: [rows, at least num_tokens], any float type; row i belongs to sequences[i].

        If sampling raises, the rows are sampled one by one, and only those that raise alone fail. Raises if no row of
        several can be sampled: then it is not the rows' fault.
        """
        try:
            return self._sample(logits, sequences)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.error("sampling %d rows failed; each is sampled alone: %s", len(sequences), where_from(error))
            sampled = [self._sample_alone(logits[row : row + 1], sequence) for row, sequence in enumerate(sequences)]
            if len(sampled) > 1 and all(item.is_fault for item in sampled):
                raise
            return sampled

    def _sample_alone(self, logits: Tensor, sequence: SequenceState) -> SampledToken:
        try:
            return self._sample(logits, [sequence])[0]
        except Exception as error:  # noqa: BLE001
            # the row's request fails; the traceback of the whole batch is in the log already
            logger.error("sequence %d cannot be sampled: %s", sequence.id, type(error).__name__)
            return SampledToken(None, is_fault=True)

    def _sample(self, logits: Tensor, sequences: list[SequenceState]) -> list[SampledToken]:
        raw = logits[:, : self.num_tokens].float()  # ids behind num_tokens are padding of the embedding: no text
        finite = torch.isfinite(raw.sum(dim=-1))
        adjusted, failed = self._masked(self._adjust(raw, sequences), raw, sequences)
        chosen = torch.argmax(adjusted, dim=-1)
        drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        draw = (
            Draw(
                adjusted if len(drawn) == len(sequences) else adjusted[numbers_to_device(drawn, self._device)],
                [sequences[row] for row in drawn],
            )
            if drawn
            else None
        )
        logprobs = Logprobs(raw, sequences)
        parts = [chosen, finite] if draw is None else [chosen, finite, draw.chosen, draw.is_settled]
        read: list[list[int]] = [part.tolist() for part in torch.cat(parts).cpu().split([len(part) for part in parts])]
        token_ids, is_finite = read[:2]
        if draw is not None:
            unsettled = [at for at, row in enumerate(drawn) if is_finite[row] and not read[3][at]]
            for at, token_id in draw.settle(unsettled).items():
                read[2][at] = token_id
            for row, token_id in zip(drawn, read[2], strict=True):
                token_ids[row] = token_id
        reports = logprobs.of(token_ids)
        return [
            SampledToken(token_ids[row], reports.get(row))
            if is_finite[row] and row not in failed
            else SampledToken(None, None, row in failed)
            for row in range(len(sequences))
        ]

    def _adjust(self, raw: Tensor, sequences: list[SequenceState]) -> Tensor:
        """Logits with penalties, bias and the ban on early stop tokens, for the rows that have any."""
        adjusted = raw
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            has_penalty = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
            bans_stop = sequence.num_generated < sampling.min_tokens and sampling.stop_token_ids
            if not (has_penalty or bans_stop or sampling.logit_bias):
                continue
            if adjusted is raw:
                adjusted = raw.clone()
            if has_penalty:
                self._penalise(adjusted[row], sequence)
            for token_id, bias in sampling.logit_bias:
                adjusted[row, token_id] += bias
            if bans_stop:
                for token_id in sampling.stop_token_ids:
                    adjusted[row, token_id : token_id + 1] = -torch.inf  # no-op behind the vocabulary
        return adjusted

    def _masked(self, adjusted: Tensor, raw: Tensor, sequences: list[SequenceState]) -> tuple[Tensor, set[int]]:
        """Logits without the tokens that the sequences' masks forbid, and the rows whose masks failed."""
        words: dict[int, Tensor] = {}
        failed: set[int] = set()
        for row, sequence in enumerate(sequences):
            if sequence.mask is None:
                continue
            try:
                allowed = sequence.mask.allowed()
            except Exception as error:  # noqa: BLE001
                logger.error("the mask of one request failed: %s", where_from(error))
                failed.add(row)
                continue
            if allowed is not None:
                words[row] = allowed
        if words:
            banned = to_device(banned_tokens(torch.stack([*words.values()]), self.num_tokens), self._device)
            adjusted = raw.clone() if adjusted is raw else adjusted
            for i, row in enumerate(words):
                adjusted[row].masked_fill_(banned[i], -torch.inf)
        return adjusted, failed

    def _penalise(self, row: Tensor, sequence: SequenceState) -> None:
        counts = self._counts.get(sequence)
        if counts is None:
            counts = self._counts[sequence] = TokenCounts(sequence, self.num_tokens, self._device)
        counts.update(sequence.token_ids)
        sampling = sequence.sampling
        if sampling.repetition_penalty != 1.0:
            factor = sampling.repetition_penalty
            seen = (counts.prompt > 0) | (counts.answer > 0)
            row.copy_(torch.where(seen, torch.where(row > 0, row / factor, row * factor), row))
        row -= sampling.frequency_penalty * counts.answer + sampling.presence_penalty * (counts.answer > 0)


def banned_tokens(words: Tensor, num_tokens: int) -> Tensor:
    """The bits of masks that are not set. words: [rows, words] int32 on the CPU -> [rows, num_tokens] bool.

    numpy unpacks 16 masks of 65,024 bits in 0.2 ms, shifting and comparing in torch takes 3.5 ms.
    """
    octets = np.invert(words.numpy()).view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=1, count=num_tokens, bitorder="little")).view(torch.bool)


class Draw:
    """One random token a row by its temperature, top_k, top_p and min_p. It is drawn from the most likely tokens;
    `is_settled` says for which rows those are enough to know the result."""

    def __init__(self, logits: Tensor, sequences: list[SequenceState], is_native: bool = True) -> None:
        """logits: [rows, vocabulary] float32. is_native: whether the compiled kernel may be used, which knows each."""
        vocabulary = logits.shape[-1]
        self._settings = [_settings(sequence, vocabulary) for sequence in sequences]
        settings = to_device(torch.tensor(self._settings, dtype=torch.float64), logits.device)
        library = decoder_native.functions() if is_native and logits.device.type == "cpu" else None
        if library is not None:
            self.chosen = decoder_native.sample(logits, settings, library).long()
            self.is_settled = torch.ones(len(logits), dtype=torch.bool)
            return
        # relative to the maximum, so that a tiny temperature cannot overflow
        self._scaled = (logits - logits.amax(dim=-1, keepdim=True)) / settings[:, :1].to(logits.dtype)
        weights = self._scaled.exp()
        candidates, token_ids = weights.topk(min(NUM_CANDIDATES, vocabulary), dim=-1)
        positions, self.is_settled = _choose(candidates, weights.sum(dim=-1, dtype=torch.float64), settings, vocabulary)
        self.chosen = token_ids.gather(1, positions[:, None])[:, 0]

    def settle(self, rows: list[int]) -> dict[int, int]:
        """The tokens of these rows, drawn from the whole vocabulary."""
        if not rows:
            return {}
        if self._scaled.device.type == "cuda":
            return dict(zip(rows, self._sorted(rows), strict=True))
        return {row: _from_whole_row(RankedRow(self._scaled[row]), self._settings[row]) for row in rows}

    def _sorted(self, rows: list[int]) -> list[int]:
        """The same by sorting whole rows: one operation for a GPU, while each query of RankedRow would wait for it."""
        chosen = numbers_to_device(rows, self._scaled.device)
        weights, token_ids = self._scaled[chosen].exp().sort(dim=-1, descending=True, stable=True)
        settings = to_device(torch.tensor([self._settings[row] for row in rows], dtype=torch.float64), weights.device)
        positions, _ = _choose(weights, weights.sum(dim=-1, dtype=torch.float64), settings, weights.shape[-1])
        drawn: list[int] = token_ids.gather(1, positions[:, None])[:, 0].tolist()
        return drawn


def _from_whole_row(ranked: RankedRow, settings: tuple[float, float, float, float, float]) -> int:
    _, top_p, min_p, top_k, uniform = settings
    kept = min(int(top_k), ranked.count_above(min_p))
    kept = min(kept, ranked.count_up_to(top_p * ranked.mass_of(int(top_k))))
    return ranked.token_at(uniform * ranked.mass_of(kept), kept)


def _settings(sequence: SequenceState, vocabulary: int) -> tuple[float, float, float, float, float]:
    sampling = sequence.sampling
    top_k = sampling.top_k if 0 < sampling.top_k < vocabulary else vocabulary
    return max(sampling.temperature, 1e-6), sampling.top_p, sampling.min_p, top_k, _uniform(sequence)


def _choose(weights: Tensor, total: Tensor, settings: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling over the most likely tokens.

    weights: [rows, candidates], descending, 1 for the most likely token; total: [rows], the sum over the whole row;
    settings: [rows, 5], see `_settings`.
    top_k comes first, top_p is a share of what top_k left, min_p is relative to the most likely token.
    Returns [rows] positions among the candidates, and whether the candidates are enough to know them.
    """
    _, top_p, min_p, top_k, uniform = settings.unbind(dim=1)
    weights = weights.double()
    number = torch.arange(weights.shape[-1], device=weights.device)
    in_top_k = number < top_k[:, None]
    has_top_k = top_k <= weights.shape[-1]
    mass = torch.where(has_top_k, (weights * in_top_k).sum(dim=-1), total)
    before = weights.cumsum(dim=-1) - weights
    kept = in_top_k & (before < (top_p * mass)[:, None]) & (weights >= min_p[:, None])
    kept[:, 0] = True
    cumulative = (weights * kept).cumsum(dim=-1)
    # where no token is excluded, the mass is known, and most draws fall among the candidates
    is_whole = (top_p >= 1) & (min_p <= 0) & (top_k >= vocabulary) & ~has_top_k
    target = uniform * torch.where(is_whole, total, cumulative[:, -1])
    positions = (cumulative <= target[:, None]).sum(dim=-1)
    # a top_k between the candidates and the vocabulary changes what top_p is a share of: that takes the whole row
    is_settled = has_top_k | (~kept[:, -1] & (top_k >= vocabulary)) | (is_whole & (target < cumulative[:, -1]))
    return torch.minimum(positions, kept.sum(dim=-1) - 1), is_settled


class RankedRow:
    """A whole row in order of likelihood, without sorting it: tokens are counted into bins by their log-weight, and
    only the bin that a query needs is sorted. The results of a full sort of the row in a tenth of its time.
    """

    BINS_PER_NAT = 64
    NUM_BINS = 2048

    def __init__(self, scaled: Tensor) -> None:
        """scaled: [vocabulary] log-weights, 0 for the most likely token."""
        self._weights = scaled.exp().double()
        self._bins = (scaled * -self.BINS_PER_NAT).clamp_(max=self.NUM_BINS - 1).to(torch.int64)
        self._counts = torch.bincount(self._bins, minlength=self.NUM_BINS).cumsum(0)
        self._masses = torch.bincount(self._bins, self._weights, minlength=self.NUM_BINS).cumsum(0)

    def count_above(self, weight: float) -> int:
        """How many tokens have at least this weight; at least one."""
        return max(1, int((self._weights >= weight).sum()))

    def mass_of(self, count: int) -> float:
        """The weight of the `count` most likely tokens."""
        bin_number = min(int(torch.searchsorted(self._counts, count)), self.NUM_BINS - 1)
        num_before, mass_before, weights, _ = self._sorted(bin_number)
        return mass_before + float(weights[: count - num_before].sum())

    def count_up_to(self, mass: float) -> int:
        """How many of the most likely tokens it takes to reach this mass; at least one."""
        bin_number = min(int(torch.searchsorted(self._masses, mass)), self.NUM_BINS - 1)
        num_before, mass_before, weights, _ = self._sorted(bin_number)
        before = mass_before + weights.cumsum(0) - weights
        return max(1, num_before + int((before < mass).sum()))

    def token_at(self, mass: float, count: int) -> int:
        """The token at which the running mass passes `mass`, among the `count` most likely."""
        bin_number = min(
            int(torch.searchsorted(self._masses, mass, right=True)), int(torch.searchsorted(self._counts, count))
        )
        num_before, mass_before, weights, token_ids = self._sorted(bin_number)
        position = int((mass_before + weights.cumsum(0) <= mass).sum())
        return int(token_ids[min(position, count - num_before - 1, len(token_ids) - 1)])

    def _sorted(self, bin_number: int) -> tuple[int, float, Tensor, Tensor]:
        """(tokens before the bin, their mass, the bin's weights in descending order, their token ids)"""
        members = (self._bins == bin_number).nonzero()[:, 0]
        weights, order = self._weights[members].sort(descending=True, stable=True)
        if bin_number == 0:
            return 0, 0.0, weights, members[order]
        return int(self._counts[bin_number - 1]), float(self._masses[bin_number - 1]), weights, members[order]


def _uniform(sequence: SequenceState) -> float:
    """A number in [0, 1) from the request's seed and the position of the next token (splitmix64)."""
    mask = (1 << 64) - 1
    state = (sequence.seed * 0x9E3779B97F4A7C15 + (sequence.num_generated + 1) * 0xD1B54A32D192ED03) & mask
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        state = ((state ^ (state >> 30)) * multiplier) & mask
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


class Logprobs:
    """Log-probabilities of the model's own distribution, before temperature, penalties and bias, by row."""

    def __init__(self, raw: Tensor, sequences: list[SequenceState]) -> None:
        self._counts = {
            row: count for row, s in enumerate(sequences) if (count := s.sampling.num_top_logprobs) is not None
        }
        if not self._counts:
            return
        self._all = raw[numbers_to_device(list(self._counts), raw.device)].log_softmax(dim=-1)
        self._values, self._token_ids = self._all.topk(max(self._counts.values()), dim=-1)

    def of(self, token_ids: list[int]) -> dict[int, TokenLogprob]:
        """For the rows that want them, given every row's token."""
        if not self._counts:
            return {}
        chosen = numbers_to_device([token_ids[row] for row in self._counts], self._all.device)
        own: list[float] = self._all.gather(1, chosen[:, None])[:, 0].tolist()
        values, best = self._values.tolist(), self._token_ids.tolist()
        return {
            row: TokenLogprob(token_ids[row], own[at], tuple(zip(best[at][:count], values[at][:count], strict=True)))
            for at, (row, count) in enumerate(self._counts.items())
        }
