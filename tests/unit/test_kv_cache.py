"""The allocator never loses or shares a slot; the prefix index never finds what is not there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.interface import PromptLayout, SamplingParams
from serving.engine.native.kv_cache import BLOCK, GRANULE, PrefixIndex, SlotAllocator, round_up
from serving.engine.native.sequence import SequenceState, SlotRange

SIZE = 20 * GRANULE


def sequence(
    token_ids: list[int], num_computed: int | None = None, layout: PromptLayout | None = None
) -> SequenceState:
    made = SequenceState(token_ids, SamplingParams(max_tokens=8), layout=layout or PromptLayout())
    made.num_computed = len(token_ids) if num_computed is None else num_computed
    return made


def check_disjoint(ranges: list[SlotRange]) -> None:
    ordered = sorted(ranges, key=lambda slots: slots.start)
    ends = [0, *(slots.start + slots.capacity for slots in ordered)]
    assert all(slots.start >= end for slots, end in zip(ordered, ends, strict=False))
    assert ends[-1] <= SIZE


def largest_gap(extents: list[SlotRange]) -> int:
    ordered = sorted(extents, key=lambda extent: extent.start)
    ends = [0, *(extent.start + extent.capacity for extent in ordered)]
    return max(start - end for end, start in zip(ends, [*(extent.start for extent in ordered), SIZE], strict=True))


@given(st.lists(st.tuples(st.sampled_from(["allocate", "grow", "shrink", "free", "rearrange"]), st.integers(1, 300))))
def test_ranges_stay_disjoint_and_their_content_survives_every_move(steps: list[tuple[str, int]]) -> None:
    allocator = SlotAllocator(SIZE)
    memory: list[int | None] = [None] * SIZE  # the owner of each slot's content, as the device's memory would have it
    live: list[tuple[int, SlotRange]] = []
    for number, (action, amount) in enumerate(steps):
        chosen = live[amount % len(live)] if live else None
        if action == "allocate":
            free = largest_gap([slots for _, slots in live])
            slots = allocator.allocate(amount)
            assert (slots is not None) == (free >= round_up(amount))
            if slots is not None:
                live.append((number, slots))
        elif chosen is None:
            continue
        elif action == "grow":
            if allocator.grow(chosen[1], amount):
                assert chosen[1].capacity >= amount
        elif action == "shrink":
            allocator.shrink(chosen[1], amount)
        elif action == "free":
            allocator.free(chosen[1])
            live.remove(chosen)
        else:
            wanted = min(round_up(amount), allocator.num_free)
            for move in allocator.rearrange([slots for _, slots in live[::2]], chosen[1], wanted):
                memory[move.target : move.target + move.length] = memory[move.source : move.source + move.length]
            assert allocator.grow(chosen[1], chosen[1].capacity + wanted // GRANULE * GRANULE)
        check_disjoint([slots for _, slots in live])
        assert allocator.num_used + allocator.num_free == allocator.size == SIZE
        if action == "rearrange":
            for owner, slots in live:
                held = memory[slots.start : slots.start + slots.capacity]
                assert {one for one in held if one is not None} <= {owner} or slots is chosen[1]
        for owner, slots in live:
            memory[slots.start : slots.start + slots.capacity] = [owner] * slots.capacity


def test_the_longest_computed_beginning_is_found_and_compared_token_by_token() -> None:
    index = PrefixIndex()
    shared = list(range(100))
    index.add(sequence([*shared[:50], 7, 7, 7]))
    longest = sequence([*shared[:90], 9, 9])
    index.add(longest)
    match = index.find(sequence([*shared, 5, 5]))
    assert match is not None
    assert (match.owner, match.length) == (longest, 90)


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    index = PrefixIndex()
    index.add(sequence(list(range(64))))
    match = index.find(sequence(list(range(64))))
    assert match is not None
    assert match.length == 63


def test_what_is_not_computed_yet_is_not_ready() -> None:
    index = PrefixIndex()
    index.add(sequence(list(range(80)), num_computed=20))
    match = index.find(sequence([*range(80), 1]))
    assert match is not None
    assert (match.length, match.num_ready) == (80, 20)


def test_a_two_way_prompt_matches_only_the_same_prompt() -> None:
    index = PrefixIndex()
    index.add(sequence(list(range(64)), layout=PromptLayout(num_two_way=40)))
    same = index.find(sequence([*range(64), 1], layout=PromptLayout(num_two_way=40)))
    assert same is not None
    assert same.length == 64
    assert index.find(sequence([*range(64), 1], layout=PromptLayout(num_two_way=50))) is None
    assert index.find(sequence([*range(30), *range(90, 120)], layout=PromptLayout(num_two_way=40))) is None


def test_a_removed_sequence_is_not_found() -> None:
    index = PrefixIndex()
    owner = sequence(list(range(3 * BLOCK)))
    index.add(owner)
    index.remove(owner)
    assert index.find(sequence(list(range(4 * BLOCK)))) is None
