"""The cache law: append a block, commit n, go on ≡ only those n tokens were ever fed."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_chat.runtime.cache import Geometry, KVCache
from tests.runtime import tiny

BLOCKS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda b: (b[0], min(b))), max_size=12
)


@settings(max_examples=40, deadline=None)
@given(blocks=BLOCKS, seed=st.integers(0, 1000))
def test_commit_n_equals_feeding_n_tokens(blocks: list[tuple[int, int]], seed: int) -> None:
    target = tiny.target()
    cache = target.new_cache(256)
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
    torch.testing.assert_close(after, direct[-2:], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(blocks=BLOCKS, window=st.sampled_from([0, 4, 16]))
def test_drafts_never_dirty_the_drafters_context(
    blocks: list[tuple[int, int]], window: int
) -> None:
    target = tiny.target()
    busy, calm = tiny.drafter(target, window=window), tiny.drafter(target, window=window)
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
