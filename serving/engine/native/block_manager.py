"""Sequences -> the KV-cache blocks that hold their tokens, shared where their beginnings are equal. Integers only.

A block holds the keys and values of BLOCK tokens and is counted by reference. A full block is known by its tokens and
the block before it, so the blocks form a tree of prefixes, and a prompt finds the longest one that is in the cache.
Tokens are compared, not hashes: a collision could never give one request the keys of another. Blocks that no sequence
refers to stay in the tree until they are needed, least recently used first. Blocks are never moved; where a prompt ends
or differs within a block, that one block is copied (copy on write).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice

from serving.engine.native.sequence import BLOCK, Key, Node, SequenceState

MAX_CANDIDATES = 8  # of the blocks that follow a prefix, so many are compared token by token


@dataclass(frozen=True)
class PrefixMatch:
    """The beginning of a prompt that is in the cache."""

    nodes: tuple[Node, ...] = ()  # its whole blocks
    tail: Node | None = None  # a block that begins with the next tokens, to be copied
    num_tail_tokens: int = 0
    pending: Node | None = None  # the last block that running sequences are about to compute, where there is one

    @property
    def num_tokens(self) -> int:
        return len(self.nodes) * BLOCK + self.num_tail_tokens


@dataclass(frozen=True)
class BlockCopy:
    """Copy a block's keys and values, of all layers."""

    source: int
    target: int


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


class BlockManager:
    """Allocates `num_blocks` blocks. For one thread; counts may be read by others."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._nodes: list[Node | None] = [None] * num_blocks  # of the blocks that are in the tree
        self._tree: dict[Key, Node] = {}
        self._children: dict[Hashable, dict[Node, None]] = {}  # of a node or root, in the order of their making
        # without references: those that hold nothing first, then the least recently used
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_cached = 0
        self._trained: tuple[Node, ...] = ()  # the whole blocks of a trained prefix, which every sequence begins with
        self._trained_tail: Node | None = None  # its last tokens, which are copied
        self._num_trained_tail = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without references that hold a known prefix."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def find(self, sequence: SequenceState) -> PrefixMatch:
        """The longest known beginning of a waiting sequence. Its last token never counts: it has to be computed, to
        sample after it."""
        limit = len(sequence.token_ids) - 1
        nodes = list(self._trained)
        last: Node | None = None
        is_ready = True
        parent: Hashable = sequence.prefix_root
        for tokens in sequence.full_blocks(limit // BLOCK, len(nodes)):
            node = self._tree.get((parent, tokens))
            if node is None:
                break
            is_ready = is_ready and node.owner is None
            if is_ready:
                nodes.append(node)
            last = parent = node
        if last is not None and self.is_pending(last):
            return PrefixMatch(tuple(nodes), pending=last)
        tail, num_tail = self._tail(sequence, nodes, limit) if is_ready else (None, 0)
        found = PrefixMatch(tuple(nodes), tail, num_tail)
        trained = self.trained_match()
        # tokens that attend to each other both ways are computed in one piece or not at all
        is_enough = found.num_tokens >= max(sequence.num_two_way, trained.num_tokens)
        return found if is_enough else trained

    def trained_match(self) -> PrefixMatch:
        """The trained prefix alone."""
        return PrefixMatch(self._trained, self._trained_tail, self._num_trained_tail)

    def pin(self, num_tokens: int) -> list[int]:
        """Blocks for a trained prefix, which are never evicted. Call once, before there is a sequence.

        The prefix is whatever is written into them; sequences stand for it with `placeholders`.
        """
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks_for(num_tokens))]
        for block in blocks:
            self._references[block] = 1
        nodes = [Node(block, ("trained", ()), None) for block in blocks]
        num_whole, self._num_trained_tail = divmod(num_tokens, BLOCK)
        self._trained, self._trained_tail = tuple(nodes[:num_whole]), nodes[-1] if self._num_trained_tail else None
        return blocks

    def _parent(self, sequence: SequenceState, nodes: Sequence[Node]) -> Hashable:
        """What the block after these is entered under. Behind a trained prefix everything begins anew."""
        return nodes[-1] if len(nodes) > len(self._trained) else sequence.prefix_root

    def _tail(self, sequence: SequenceState, nodes: list[Node], limit: int) -> tuple[Node | None, int]:
        """The computed block after these that begins with most of the next tokens, and their number."""
        wanted = sequence.token_ids[len(nodes) * BLOCK : min(limit, (len(nodes) + 1) * BLOCK)]
        parent = self._parent(sequence, nodes)
        best: Node | None = None
        most = 0
        for node in islice(reversed(self._children.get(parent, {})), MAX_CANDIDATES):
            pairs = list(zip(wanted, node.key[1], strict=False))
            length = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            if length > most and node.owner is None:
                best, most = node, length
        return best, most

    def is_pending(self, node: Node) -> bool:
        """Whether a running sequence is about to compute it, and its reader does not hold it up."""
        return node.owner is not None and not node.owner.is_paused and self._tree.get(node.key) is node

    def num_reusable(self, match: PrefixMatch) -> int:
        """Blocks of a match that are in use anyway: taking them costs no free block."""
        return sum(self._references[node.block] > 0 for node in match.nodes)

    def take(self, sequence: SequenceState, match: PrefixMatch, num_tokens: int) -> BlockCopy | None:
        """Begin a sequence's table with the blocks of its prefix and extend it to `num_tokens` tokens, for which enough
        blocks are free. Returns the copy that has to be made before the step."""
        for node in match.nodes:
            self._acquire(node.block)
        sequence.blocks = [node.block for node in match.nodes]
        sequence.nodes = list(match.nodes)
        sequence.num_computed = match.num_tokens
        if match.tail is None:
            assert self.extend(sequence, num_tokens)
            return None
        source = match.tail.block
        self._acquire(source)  # or it might be evicted for this very sequence
        if not self.extend(sequence, num_tokens):  # it was the last free block
            self._drop(source)
            sequence.num_computed = len(match.nodes) * BLOCK
            assert self.extend(sequence, num_tokens)
            if self._trained_tail is None or len(match.nodes) > len(self._trained):
                return None
            sequence.num_computed += self._num_trained_tail
            return BlockCopy(self._trained_tail.block, sequence.blocks[len(match.nodes)])
        self._drop(source)
        return BlockCopy(source, sequence.blocks[len(match.nodes)])

    def extend(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Give a sequence blocks for `num_tokens` tokens; False, and nothing changed, if too few are free."""
        missing = num_blocks_for(num_tokens) - len(sequence.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            sequence.blocks.append(block)
        return True

    def register(self, sequence: SequenceState) -> None:
        """Enter a sequence's full blocks into the tree, so that others can wait for them. Call again when it grew."""
        known = len(sequence.nodes)
        parent = self._parent(sequence, sequence.nodes)
        for index, tokens in enumerate(sequence.full_blocks(len(sequence.token_ids) // BLOCK, known), known):
            key = (parent, tokens)
            node = self._tree.get(key) or self._enter(Node(sequence.blocks[index], key, sequence))
            sequence.nodes.append(node)  # perhaps of another sequence that has computed the same
            parent = node

    def computed(self, sequence: SequenceState, since: int) -> None:
        """More of a sequence's tokens are in the cache; before, it were `since`."""
        for index in range(since // BLOCK, min(sequence.num_computed // BLOCK, len(sequence.nodes))):
            node = sequence.nodes[index]
            if node.block == sequence.blocks[index]:
                node.owner = None

    def release(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
        """Give up a sequence's blocks; what it has computed can be found until the blocks are needed."""
        if keep_prefix:
            self._register_end(sequence)
        for node, block in zip(sequence.nodes, sequence.blocks, strict=False):
            if node.block == block and self._references[block] == 1 and (node.owner or not keep_prefix):
                self._forget(block)
        for block in reversed(sequence.blocks):  # the end of a prefix is evicted before its beginning
            self._drop(block)
        sequence.blocks, sequence.nodes = [], []

    def _enter(self, node: Node) -> Node:
        self._tree[node.key] = self._nodes[node.block] = node
        self._children.setdefault(node.key[0], {})[node] = None
        return node

    def _register_end(self, sequence: SequenceState) -> None:
        """Enter the tokens after the last full block, where the next round of a conversation goes on."""
        index, num_tokens = divmod(sequence.num_computed, BLOCK)
        if sequence.pooled is not None or not num_tokens or len(sequence.nodes) < index:
            return
        tokens = tuple(sequence.token_ids[index * BLOCK : sequence.num_computed])
        key = (self._parent(sequence, sequence.nodes[:index]), tokens)
        if self._nodes[sequence.blocks[index]] is None and key not in self._tree:
            self._enter(Node(sequence.blocks[index], key, None))

    def _acquire(self, block: int) -> None:
        if not self._references[block]:
            del self._free[block]
            self._num_cached -= 1
        self._references[block] += 1

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        self._free[block] = None
        if self._nodes[block] is None:
            self._free.move_to_end(block, last=False)
        else:
            self._num_cached += 1

    def _forget(self, block: int) -> None:
        """Remove a block from the tree. What follows it there cannot be found any more, and is evicted in its turn."""
        node = self._nodes[block]
        if node is not None:
            del self._tree[node.key]
            siblings = self._children[node.key[0]]
            del siblings[node]
            if not siblings:
                del self._children[node.key[0]]
            self._nodes[block] = None
            self._num_cached -= not self._references[block]
