"""Blocks are never lost, shared only where beginnings are equal, and found by tokens, not by hashes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.interface import PromptLayout, SamplingParams
from serving.engine.native.block_manager import BlockManager, PrefixMatch, num_blocks_for
from serving.engine.native.sequence import BLOCK, SequenceState


def sequence(token_ids: list[int], layout: PromptLayout | None = None, key: str | None = None) -> SequenceState:
    made = SequenceState(token_ids, SamplingParams(max_tokens=8), layout=layout or PromptLayout(), prefix_key=key)
    return made


def admit(blocks: BlockManager, one: SequenceState, computed: int | None = None) -> PrefixMatch:
    """What the scheduler does; `computed` tokens are then in the cache."""
    match = blocks.find(one)
    blocks.take(one, match, len(one.token_ids) + 1)
    blocks.register(one)
    since, one.num_computed = one.num_computed, len(one.token_ids) if computed is None else computed
    blocks.computed(one, since)
    return match


def test_the_longest_computed_beginning_is_found() -> None:
    blocks = BlockManager(64)
    shared = list(range(100))
    admit(blocks, sequence([*shared[:50], 7, 7, 7]))
    longest = sequence([*shared[:90], 9, 9])
    admit(blocks, longest)
    match = blocks.find(sequence([*shared, 5, 5]))
    assert [node.block for node in match.nodes] == longest.blocks[: 90 // BLOCK]
    assert match.pending is None
    assert match.num_tokens == 80  # the next block is not full, so it is not known


def test_a_block_that_begins_alike_is_copied() -> None:
    blocks = BlockManager(64)
    admit(blocks, sequence([*range(20), *[5] * 40]))
    owner = sequence(list(range(60)))
    admit(blocks, owner)
    one = sequence([*range(27), 9, 9])
    match = blocks.find(one)
    assert (match.num_tokens, match.tail) == (27, owner.nodes[1])
    copy = blocks.take(one, match, 30)
    assert copy is not None
    assert (copy.source, copy.target) == (owner.blocks[1], one.blocks[1])
    assert one.num_computed == 27
    assert blocks.find(sequence(list(range(27)))).num_tokens == 26  # the last token has to be computed


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    blocks = BlockManager(64)
    admit(blocks, sequence(list(range(4 * BLOCK))))
    assert blocks.find(sequence(list(range(4 * BLOCK)))).num_tokens == 4 * BLOCK - 1
    assert blocks.find(sequence(list(range(4 * BLOCK + 1)))).num_tokens == 4 * BLOCK


def test_what_is_not_computed_yet_is_pending_until_its_owner_computes_it_or_leaves() -> None:
    blocks = BlockManager(64)
    owner = sequence(list(range(80)))
    admit(blocks, owner, computed=20)
    match = blocks.find(sequence([*range(80), 1]))
    assert (match.num_tokens, match.pending) == (BLOCK, owner.nodes[-1])  # the last one that both have
    assert match.pending is not None
    owner.is_paused = True  # its reader may never come back
    assert not blocks.is_pending(match.pending)
    owner.is_paused = False
    assert blocks.is_pending(match.pending)
    blocks.release(owner)
    assert not blocks.is_pending(match.pending)
    assert blocks.find(sequence([*range(80), 1])).num_tokens == BLOCK  # what it had computed stays


def test_a_two_way_prompt_matches_only_the_same_prompt_and_as_a_whole() -> None:
    blocks = BlockManager(64)
    admit(blocks, sequence(list(range(64)), PromptLayout(num_two_way=40)))
    assert blocks.find(sequence([*range(64), 1], PromptLayout(num_two_way=40))).num_tokens == 64
    assert blocks.find(sequence([*range(64), 1], PromptLayout(num_two_way=50))).num_tokens == 0
    assert blocks.find(sequence([*range(34), *range(90, 120)], PromptLayout(num_two_way=40))).num_tokens == 0


def test_prompts_of_different_keys_share_nothing() -> None:
    blocks = BlockManager(64)
    admit(blocks, sequence(list(range(64)), key="adapter"))
    assert blocks.find(sequence([*range(64), 1])).num_tokens == 0
    assert blocks.find(sequence([*range(64), 1], key="adapter")).num_tokens == 64


def test_what_failed_is_not_found() -> None:
    blocks = BlockManager(64)
    owner = sequence(list(range(64)))
    admit(blocks, owner)
    blocks.release(owner, keep_prefix=False)
    assert blocks.find(sequence([*range(64), 1])).num_tokens == 0
    assert (blocks.num_used, blocks.num_cached, blocks.num_free) == (0, 0, 64)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning_and_the_least_recently_used_first() -> None:
    blocks = BlockManager(8)
    old, new = sequence(list(range(3 * BLOCK))), sequence(list(range(500, 500 + 3 * BLOCK)))
    for one in (old, new):
        admit(blocks, one)
        blocks.release(one)
    assert blocks.num_cached == 6
    other = sequence(list(range(900, 900 + 4 * BLOCK - 1)))
    admit(blocks, other)  # four blocks: the two that hold nothing, then two of the older prefix
    assert len(blocks.find(sequence([*range(3 * BLOCK), 1])).nodes) == 1
    assert blocks.find(sequence([*range(500, 500 + 3 * BLOCK), 1])).num_tokens == 3 * BLOCK


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "grow", "release", "fail"]),
            st.integers(0, 5),
            st.integers(1, 200),
            st.integers(0, 9),
        )
    )
)
def test_blocks_are_never_lost_or_shared_by_different_beginnings(steps: list[tuple[str, int, int, int]]) -> None:
    blocks = BlockManager(40)
    content: dict[int, tuple[int, ...]] = {}  # block -> the tokens up to its end, as the memory would depend on them
    live: list[SequenceState] = []
    for action, group, amount, chosen in steps:
        one = live[chosen % len(live)] if live else None
        if action == "admit":
            new = sequence([group] * (amount // 2) + list(range(amount - amount // 2)))
            match = blocks.find(new)
            if num_blocks_for(amount + 1) - blocks.num_reusable(match) > blocks.num_free:
                continue
            for block, tokens in list(content.items()):
                assert (
                    match.tail is None
                    or block != match.tail.block
                    or tokens[: match.num_tokens] == tuple(new.token_ids[: match.num_tokens])
                )
            admit(blocks, new)
            live.append(new)
            for node, position in zip(match.nodes, range(BLOCK, amount + BLOCK, BLOCK), strict=False):
                assert content[node.block] == tuple(new.token_ids[:position])
            one = new
        elif one is None:
            continue
        elif action == "grow":
            if not blocks.extend(one, len(one.token_ids) + amount):
                continue
            one.token_ids += [amount] * amount
            since, one.num_computed = one.num_computed, len(one.token_ids)
            blocks.register(one)
            blocks.computed(one, since)
        else:
            blocks.release(one, keep_prefix=action == "release")
            live.remove(one)
            continue
        for index, block in enumerate(one.blocks):
            content[block] = tuple(one.token_ids[: (index + 1) * BLOCK])
        used = {block for each in live for block in each.blocks}
        assert blocks.num_used == len(used)
        assert blocks.num_used + blocks.num_free == blocks.num_blocks
        assert 0 <= blocks.num_cached <= blocks.num_free
        for each in live:
            assert len(set(each.blocks)) == len(each.blocks) >= num_blocks_for(len(each.token_ids))
            for index, block in enumerate(each.blocks[: len(each.token_ids) // BLOCK]):
                assert content[block] == tuple(each.token_ids[: (index + 1) * BLOCK])
