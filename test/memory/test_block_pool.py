# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The block pool loses no block, and finds blocks by their hash."""

from __future__ import annotations

from hypothesis import given, settings as hypothesis_settings, strategies as st
import pytest

from mace_ros.memory.block_pool import BlockPool, OutOfBlocks


@hypothesis_settings(max_examples=150)
@given(st.data())
def test_no_block_is_lost_and_a_hash_finds_its_content(data: st.DataObject) -> None:
    pool = BlockPool(10, 4)
    tables: list[list[int]] = []
    written: dict[int, bytes] = {}     # content of each block
    hashes = [bytes([n]) for n in range(6)]
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(['take', 'grow', 'share', 'release', 'shrink']))
        if action == 'take' or not tables:
            table: list[int] = []
            tables.append(table)
            fresh(pool, table, data.draw(st.integers(0, 12)), written, data)
        elif action == 'grow':
            table = data.draw(st.sampled_from(tables))
            fresh(pool, table, len(table) * 4 + data.draw(st.integers(0, 8)), written, data)
        elif action == 'share':
            wanted = data.draw(st.lists(st.sampled_from(hashes), max_size=3, unique=True))
            found = pool.lookup(wanted)
            assert [written[b] for b in found] == wanted[:len(found)]
            if pool.held_among(found) + pool.free_blocks >= len(found):
                tables.append(pool.acquire(found))
        elif action == 'release':
            table = tables.pop(data.draw(st.integers(0, len(tables) - 1)))
            before, free = pool.frees(table), pool.free_blocks
            pool.release(table)
            assert table == [] and pool.free_blocks == free + before
        else:
            pool.shrink(data.draw(st.integers(1, 10)))
        moved = pool.compact()
        content = {new: written[old] for old, new in moved.items()}
        written |= content
        for table in tables:
            table[:] = [moved.get(b, b) for b in table]
        pool.check(tables)
        assert pool.cached_blocks <= max(pool.free_blocks, 0)
        if pool.free_blocks >= 0:
            assert all(b < pool.limit for table in tables for b in table)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.free_blocks == pool.limit


def fresh(pool: BlockPool, table: list[int], tokens: int, written: dict[int, bytes],
          data: st.DataObject) -> None:
    """Grow a table, write content into each new block, and perhaps cache it."""
    held, before = len(table), list(table)
    try:
        pool.grow(table, tokens)
    except OutOfBlocks:
        assert pool.blocks_for(tokens) - held > pool.free_blocks and table == before
        return
    for block in table[held:]:
        written[block] = bytes([data.draw(st.integers(0, 5))])
        if data.draw(st.booleans()):
            pool.cache(block, written[block])


def test_eviction_takes_the_least_recently_used_block_and_prefixes_last() -> None:
    pool = BlockPool(4, 16)
    one, two = pool.allocate(32), pool.allocate(32)
    for table, hashes in ((one, (b'a', b'b')), (two, (b'c', b'd'))):
        for block, block_hash in zip(table, hashes, strict=True):
            pool.cache(block, block_hash)
        pool.release(table)
    pool.release(pool.acquire(pool.lookup([b'a'])))     # now most recently used
    held = [pool.allocate(16)]
    assert (pool.lookup([b'a']), pool.lookup([b'd'])) != ([], []) and not pool.lookup([b'b'])
    held.append(pool.allocate(16))
    assert pool.lookup([b'c']) == [] or pool.lookup([b'd']) == []
    held += [pool.allocate(16)]
    assert len(pool.lookup([b'a'])) == 1
    held += [pool.allocate(16)]
    assert pool.lookup([b'a']) == []
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


def test_check_finds_leaked_and_doubly_used_blocks() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(20)
    pool.check([table])
    with pytest.raises(AssertionError, match='without a table'):
        pool.check([])
    with pytest.raises(AssertionError, match='in more tables'):
        pool.check([table, [table[0]]])
