"""Text of a grammar -> compiled grammar, cached -> for every sampled token the mask of the tokens allowed next.

Source: llguidance (Earley parser over byte-level lexemes). Its torch helper is not used: it compiles C++ at first use.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import llguidance
import torch
from torch import Tensor

from serving.engine.interface import TokenMask
from serving.generation.interface import PromptError
from serving.generation.structured.grammar import MAX_CALLS

logger = logging.getLogger(__name__)

MAX_CACHED = 256  # compiled grammars
MAX_CACHED_BYTES = 32 * 2**20  # their memory, as `_estimated_bytes` counts it
NUM_TRIAL_RUNS = 2
MAX_TRIAL_TOKENS = 48
MAX_TRIAL_SECONDS = 0.25
_POSITION = re.compile(r"^at \d+\(\d+\): ")
_PREFIXES = ("failed to compile JSON schema: ", "failed to parse ", "error: ")
_LIMITS = ("fuel", "too large", "too big", "stack level", "Unable to determine")  # in llguidance's messages


class MaskFailed(Exception):
    """The matcher reports an error: a token that the mask forbade, or a limit of the parser."""


class TokenTable(Protocol):
    """Token ids -> bytes; the part of a chat format that a mask needs."""

    @property
    def stop_token_ids(self) -> frozenset[int]: ...
    @property
    def num_tokens(self) -> int: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary:
    """The bytes of every token, and llguidance's tokenizer of them. Building it takes 0.8 s for 65,000 tokens."""

    def __init__(self, token_table: TokenTable) -> None:
        self.tokens = [token_table.token_bytes(i) for i in range(token_table.num_tokens)]
        self.stop_token_ids = token_table.stop_token_ids
        self.library = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Bytes(self.tokens, min(self.stop_token_ids))),
            n_vocab=len(self.tokens),
            eos_token=sorted(self.stop_token_ids),
        )
        self.num_words = (len(self.tokens) + 31) // 32
        self._sorted = sorted((text, i) for i, text in enumerate(self.tokens) if text)

    def overshooting(self, rest: bytes) -> list[int]:
        """The tokens that begin with `rest` and are longer."""
        first = bisect_left(self._sorted, (rest, len(self.tokens)))
        found: list[int] = []
        for text, token_id in self._sorted[first:]:
            if not text.startswith(rest):
                break
            found.append(token_id)
        return found


class _Bytes:
    """The tokenizer that llguidance asks for. Its tokenization is not used: the grammars forbid forced tokens."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = tokens
        self.special_token_ids = [i for i, text in enumerate(tokens) if not text]
        self._single = {text[0]: i for i, text in enumerate(tokens) if len(text) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        encoded = text.encode() if isinstance(text, str) else text
        return [self._single[byte] for byte in encoded if byte in self._single]


class Grammars:
    """Compiles and caches the grammars of one model. Thread-safe. CPU-bound: call it in worker threads."""

    def __init__(self, token_table: TokenTable) -> None:
        self._token_table = token_table
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()  # least recently used first
        self._cached_bytes = 0
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=20_000,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=100_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """Built by the first caller; others wait for it."""
        with self._building:
            return self._vocabulary

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._token_table)

    def build_vocabulary(self) -> None:
        """Builds the vocabulary ahead of the first request."""
        _ = self.vocabulary

    def compile(self, grammar: str, what: str, param: str, is_tested: bool = False) -> Grammar:
        """Raises PromptError for a grammar that llguidance refuses, that is too complex, or that no text matches.

        is_tested: the grammar passed its trial runs before, in another process.
        """
        vocabulary = self.vocabulary
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
                return Grammar(vocabulary, grammar, matcher.deep_copy())
        matcher = llguidance.LLMatcher(vocabulary.library, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise PromptError(f"Invalid {what}: {_reason(matcher.get_error())}", param)
        for number in range(0 if is_tested else NUM_TRIAL_RUNS):
            if not _passes_trial_run(matcher.deep_copy(), vocabulary, random.Random(number)):
                raise PromptError(f"Invalid {what}: it is too complex, or nothing can satisfy it.", param)
        with self._lock:
            if grammar not in self._compiled:  # another thread may have compiled it meanwhile
                self._compiled[grammar] = matcher
                self._cached_bytes += _estimated_bytes(grammar)
            while len(self._compiled) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                oldest, _ = self._compiled.popitem(last=False)
                self._cached_bytes -= _estimated_bytes(oldest)
            return Grammar(vocabulary, grammar, matcher.deep_copy())

    @property
    def num_cached(self) -> int:
        return len(self._compiled)

    def mask_of(self, specification: str) -> TokenMask:
        """The mask of a `TokenMask.specification`, for another process than the one that made it."""
        parts = json.loads(specification)
        name = "specification"
        if isinstance(parts, str):
            return self.compile(parts, name, name, is_tested=True).new_mask()
        bodies = {opening: self.compile(text, name, name, is_tested=True) for opening, text in parts["bodies"].items()}
        between = None if parts["between"] is None else self.compile(parts["between"], name, name, is_tested=True)
        return ToolCallMask(bodies, between, self.vocabulary, parts["is_at_start"])


class Grammar:
    """A compiled grammar; makes one mask for each answer."""

    def __init__(self, vocabulary: Vocabulary, text: str, matcher: llguidance.LLMatcher) -> None:
        self.vocabulary = vocabulary
        self.text = text
        self._matcher = matcher

    def new_mask(self) -> GrammarMask:
        return GrammarMask(self._matcher.deep_copy(), self.vocabulary.num_words, self.text)


class GrammarMask:
    """The state of one answer in a grammar; a TokenMask."""

    def __init__(self, matcher: llguidance.LLMatcher, num_words: int, text: str) -> None:
        self._matcher = matcher
        self._words = torch.zeros(num_words, dtype=torch.int32)
        self._text = text

    @property
    def specification(self) -> str:
        return json.dumps(self._text)

    @property
    def may_end(self) -> bool:
        """Whether the text so far matches the grammar."""
        return self._matcher.is_accepting()

    def allowed(self) -> Tensor:
        self._matcher.unsafe_compute_mask_ptr(self._words.data_ptr(), self._words.nbytes)
        if self._matcher.is_error():
            raise MaskFailed(_reason(self._matcher.get_error()))
        return self._words

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise MaskFailed(_reason(self._matcher.get_error()))


class ToolCallMask:
    """Free text until the opening of a call is complete, then calls; a TokenMask.

    bodies: for each opening the grammar of the rest of its call; between: the grammar of what follows a call, up to the
    end of the next call's opening, None if there is one call only. A token that completes an opening and has more bytes
    is forbidden: the grammar has to see all bytes behind it.
    is_at_start: only the beginning of the answer, white space aside, can be an opening.
    """

    def __init__(
        self, bodies: Mapping[str, Grammar], between: Grammar | None, vocabulary: Vocabulary, is_at_start: bool
    ) -> None:
        self._bodies = {opening.encode(): grammar for opening, grammar in bodies.items()}
        self._between = between
        self._vocabulary = vocabulary
        self._is_at_start = is_at_start
        self._longest = max(map(len, self._bodies))
        self._tail = b""  # of the text outside of calls
        self._is_free_text = False
        self._body: GrammarMask | None = None  # of the call that is being written
        self._next: GrammarMask | None = None  # of the text behind it
        self._num_calls = 0

    @property
    def specification(self) -> str:
        bodies = {opening.decode(): grammar.text for opening, grammar in self._bodies.items()}
        between = self._between.text if self._between else None
        return json.dumps({"bodies": bodies, "between": between, "is_at_start": self._is_at_start})

    def allowed(self) -> Tensor | None:
        if self._body is not None:
            words = self._body.allowed()
            if self._can_call_again():
                self._next = self._next or self._new_next()
                words = words | self._next.allowed()
            return words
        if self._next is not None:
            return self._next.allowed()
        if self._is_free_text:
            return None
        forbidden = [token_id for rest in self._missing() for token_id in self._vocabulary.overshooting(rest)]
        if not forbidden:
            return None
        bits = torch.full((self._vocabulary.num_words * 4,), 255, dtype=torch.uint8)
        for token_id in forbidden:
            bits[token_id // 8] &= ~(1 << token_id % 8) & 255
        return bits.view(torch.int32)

    def accept(self, token_id: int) -> None:
        if self._body is not None:
            if token_id in self._vocabulary.stop_token_ids or not self._can_call_again():
                self._body.accept(token_id)
                return
            self._next = self._next or self._new_next()
            self._body = None
        if self._next is not None:
            self._next.accept(token_id)
        elif self._is_free_text:
            return
        self._tail += self._vocabulary.tokens[token_id]
        if self._next is None and self._is_at_start:
            self._tail = self._tail.lstrip()
            self._is_free_text = not any(opening.startswith(self._tail) for opening in self._bodies)
        opening = self._complete_opening()
        if opening is not None:
            self._body, self._next, self._tail = self._bodies[opening].new_mask(), None, b""
            self._num_calls += 1
        elif not self._is_at_start:
            self._tail = self._tail[-self._longest :]

    def _complete_opening(self) -> bytes | None:
        """The opening that the text ends with, if a call begins there."""
        if self._next is None and self._is_at_start:
            return self._tail if self._tail in self._bodies else None
        if self._next is not None and not self._next.may_end:
            return None
        ends = [opening for opening in self._bodies if self._tail.endswith(opening)]
        return max(ends, key=len, default=None)  # of two names, one may end as the other

    def _can_call_again(self) -> bool:
        """Whether the call is complete and another one may follow it."""
        is_possible = self._between is not None and self._num_calls < MAX_CALLS
        return is_possible and self._body is not None and self._body.may_end

    def _new_next(self) -> GrammarMask:
        assert self._between is not None
        return self._between.new_mask()

    def _missing(self) -> list[bytes]:
        """The missing bytes of each opening that the text so far may have begun."""
        missing: list[bytes] = []
        for opening in self._bodies:
            if self._is_at_start:
                missing += [opening[len(self._tail) :]] if opening.startswith(self._tail) else []
            else:
                missing += [opening[size:] for size in range(len(opening)) if self._tail.endswith(opening[:size])]
        return missing


def _estimated_bytes(grammar: str) -> int:
    """Memory of a compiled grammar: 100 KB, and 25 to 170 bytes for each character of its text, as measured with
    llguidance 1.9 for JSON schemas of 0.2 to 70 KB."""
    return 100_000 + 100 * len(grammar)


def _passes_trial_run(matcher: llguidance.LLMatcher, vocabulary: Vocabulary, choose: random.Random) -> bool:
    """Whether a random answer can be generated: some patterns exceed the limits of the lexer only at run time."""
    deadline = time.monotonic() + MAX_TRIAL_SECONDS
    for _ in range(MAX_TRIAL_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or not mask:
            return False
        if time.monotonic() > deadline:
            return True
        token_id = _random_bit(mask, len(vocabulary.tokens), choose)
        if token_id in vocabulary.stop_token_ids:
            return True
        if not matcher.consume_token(token_id):
            return False
    return True


def _random_bit(mask: int, num_bits: int, choose: random.Random) -> int:
    """The first set bit at or after a random position, cyclically."""
    position = choose.randrange(num_bits)
    rest = mask >> position or mask
    start = position if mask >> position else 0
    return start + (rest & -rest).bit_length() - 1


def _reason(error: str) -> str:
    """llguidance's message in one line, without positions in the grammar text, which the client never saw."""
    if any(word in error for word in _LIMITS):
        return "it is too complex to be compiled."
    if "circular references" in error:
        return "a '$ref' that leads back to itself beside other keywords is not supported."
    lines = error.strip().split("\n")
    line = _POSITION.sub("", next((line for line in lines if line.startswith("error: ")), lines[0]))
    for prefix in _PREFIXES:
        line = line.removeprefix(prefix)
    line = line.replace("Unsatisfiable schema: ", "no document satisfies it: ", 1)
    return line[:300].rstrip(".") + "."
