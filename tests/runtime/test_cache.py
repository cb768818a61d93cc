"""The cache law: append a block, commit n, go on ≡ only those n tokens were ever fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_chat.runtime.cache import PREFILL_CHUNK, Geometry, KVCache
from tests.runtime import tiny

BLOCKS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda b: (b[0], min(b))), max_size=12
)


TARGETS: dict[str, tuple[Callable[[], Any], int]] = {  # and rows of its largest block
    "full": (tiny.target, PREFILL_CHUNK),
    "hybrid": (tiny.hybrid, PREFILL_CHUNK),
    "hybrid on rings": (tiny.hybrid, 9),
}


@pytest.mark.parametrize("kind", TARGETS)
@settings(max_examples=25, deadline=None)
@given(blocks=BLOCKS, seed=st.integers(0, 1000))
def test_commit_n_equals_feeding_n_tokens(
    kind: str, blocks: list[tuple[int, int]], seed: int
) -> None:
    make, largest = TARGETS[kind]
    target = make()
    cache = target.new_cache(256, largest)
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = [1]
    with torch.inference_mode():
        target.forward(torch.tensor(kept), cache)
        cache.commit(1)
        for rows, n in blocks:
            ids = torch.randint(0, tiny.VOCAB, (rows,), generator=generator)
            target.forward(ids, cache)
            cache.commit(n)
            kept += ids[:n].tolist()
        probe = torch.tensor([2, 3])
        after, _ = target.forward(probe, cache)
        fresh = target.new_cache(256)
        direct, _ = target.forward(torch.tensor([*kept, 2, 3]), fresh)
    assert cache.length == len(kept)
    torch.testing.assert_close(after, direct[-2:], rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(2, 7),
    causal=st.booleans(),
    turns=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.floats(0, 2)), max_size=40),
)
def test_a_row_sees_its_window_and_a_cut_keeps_it(
    window: int, causal: bool, turns: list[tuple[int, int, float]]
) -> None:
    """Every row written has a number of its own; a plain list says which ones a row must see."""
    cache = KVCache([Geometry(1, 1, window)], 60, torch.float32, tiny.CPU, largest_block=5)
    kept: list[int] = []  # numbers of the committed rows
    held: dict[int, int] = {}  # slot -> number
    written = 0
    for rows, n, cut in turns:
        if len(kept) + rows > 60:
            break
        block = list(range(written, written + rows))
        written += rows
        k = torch.tensor(block, dtype=torch.float32).view(1, rows, 1)
        seen, _ = cache.write(0, k, k)
        mask = cache.mask(rows, window, causal, share=1)
        hidden = torch.zeros(rows, seen.shape[1]) if mask is None else mask
        everything = [*kept, *block]
        for i in range(rows):
            held[(len(kept) + i) % cache.slots(window)] = block[i]
            position = len(kept) + i
            last = position + 1 if causal else len(everything)
            visible = seen[0, hidden[i] == 0, 0].int().tolist()
            assert sorted(visible) == everything[max(0, position - window + 1) : last]
        cache.commit(min(n, rows))
        kept += block[: min(n, rows)]
        if cut <= 1:
            to = int(cut * len(kept))
            needed = range(max(0, to - window + 1), to)
            intact = all(held[p % cache.slots(window)] == kept[p] for p in needed)
            assert cache.rewindable(to) == (to if intact else 0)
            if intact:
                cache.truncate(to)
                del kept[to:]


@settings(max_examples=25, deadline=None)
@given(blocks=BLOCKS, window=st.sampled_from([0, 4, 16]), largest=st.sampled_from([9, 512]))
def test_drafts_never_dirty_the_drafters_context(
    blocks: list[tuple[int, int]], window: int, largest: int
) -> None:
    target = tiny.target()
    busy, calm = (
        tiny.drafter(target, window=window, largest_block=largest) for _ in ("busy", "calm")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows, n in [(3, 3), *blocks]:
            features = torch.randn(rows, 64, generator=generator)[:n]
            for drafter in (busy, calm):
                if n:
                    drafter.observe(features)
            busy.draft(5, 4)
        calm.flush()
        assert busy.length == calm.length
        assert torch.equal(busy.draft(7, 4), calm.draft(7, 4))


def test_truncate_and_commit_refuse_what_is_not_there() -> None:
    cache = KVCache([Geometry(1, 2)], 8, torch.float32, tiny.CPU)
    cache.write(0, torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    for wrong in (lambda: cache.commit(4), lambda: cache.truncate(1)):
        try:
            wrong()
        except AssertionError:
            continue
        raise RuntimeError("accepted")
    cache.commit(2)
    assert (cache.length, cache.provisional) == (2, 0)


@settings(max_examples=60, deadline=None)
@given(window=st.integers(0, 7), blocks=BLOCKS)
def test_what_a_block_may_see_is_in_order_whether_a_ring_wraps_or_not(
    window: int, blocks: list[tuple[int, int]]
) -> None:
    cache = KVCache([Geometry(1, 2, window)], 120, torch.float32, tiny.CPU, 9)
    for rows, n in blocks:
        begin, end = cache.length, cache.length + rows
        positions = torch.arange(begin, end)[None, :, None].expand(1, rows, 2).float()
        cache.write(0, positions, -positions)
        keys, values = cache.seen(0, rows)
        first = max(0, begin - window + 1) if window else 0
        assert keys[0, :, 0].tolist() == list(range(first, end))
        assert torch.equal(values, -keys)
        cache.commit(n)
