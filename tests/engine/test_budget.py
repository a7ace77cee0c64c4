import logging
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import FakeBackend, make_engine, model_with

from cupaged.config import EngineConfig
from cupaged.errors import OutOfMemoryError
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.memory.budget import (
    CPU_KV_CACHE_BYTES,
    fit_max_model_len,
    format_bytes,
    kv_cache_bytes,
    num_kv_blocks,
    wanted_max_model_len,
)

GiB = 1 << 30
MODEL = model_with(max_position_embeddings=8192)
LAYOUT = KVLayout(
    num_layers=1, num_kv_heads=1, block_size=16, head_dim=1, dtype=np.dtype(np.float64), blocks_per_slab=1
)


def device(free, total, name="cuda"):
    return SimpleNamespace(name=name, memory_info=lambda: (free, total))


def test_the_cache_gets_what_the_utilization_leaves():
    assert kv_cache_bytes(EngineConfig(gpu_memory_utilization=0.9), device(70 * GiB, 80 * GiB)) == 62 * GiB
    assert kv_cache_bytes(EngineConfig(gpu_memory_utilization=1.0), device(70 * GiB, 80 * GiB)) == 70 * GiB


def test_nothing_left_is_an_error_with_numbers_and_a_way_out():
    with pytest.raises(OutOfMemoryError) as error:
        kv_cache_bytes(EngineConfig(gpu_memory_utilization=0.5), device(30 * GiB, 80 * GiB))
    for part in ("50.00 GiB of 80.00 GiB", "gpu_memory_utilization=0.5", "--gpu-memory-utilization"):
        assert part in str(error.value)


def test_an_explicit_size_is_taken_or_refused():
    config = EngineConfig(kv_cache_memory_bytes=2 * GiB)
    assert kv_cache_bytes(config, device(3 * GiB, 80 * GiB)) == 2 * GiB
    with pytest.raises(OutOfMemoryError, match=r"2.00 GiB, but 1.00 GiB are free.*--kv-cache-memory"):
        kv_cache_bytes(config, device(1 * GiB, 80 * GiB))


def test_on_the_host_the_default_is_modest():
    assert kv_cache_bytes(EngineConfig(), device(100 * GiB, 200 * GiB, "cpu")) == CPU_KV_CACHE_BYTES == 4 * GiB
    assert kv_cache_bytes(EngineConfig(), device(3 * GiB, 200 * GiB, "cpu")) == 3 * GiB // 2


def test_blocks_that_fit():
    assert num_kv_blocks(1000, 100) == 10
    assert num_kv_blocks(1099, 100) == 10
    with pytest.raises(OutOfMemoryError, match=r"0.1 KiB, but one block needs 0.2 KiB.*--block-size"):
        num_kv_blocks(100, 200)


def test_max_model_len_is_the_models_lowered_to_what_fits(caplog):
    assert fit_max_model_len(EngineConfig(), MODEL, LAYOUT, max_blocks=512) == 8192
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert fit_max_model_len(EngineConfig(), MODEL, LAYOUT, max_blocks=511) == 8176
    [record] = caplog.records
    assert "lowered from 8192 to 8176" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_max_model_len_that_was_asked_for_fits_or_is_refused():
    config = EngineConfig(max_model_len=4096)
    assert fit_max_model_len(config, MODEL, LAYOUT, max_blocks=256) == 4096
    with pytest.raises(OutOfMemoryError) as error:
        fit_max_model_len(config, MODEL, LAYOUT, max_blocks=255)
    for part in ("max_model_len=4096", "64.0 KiB", "63.8 KiB", "to 4080", "kv_cache_memory_bytes"):
        assert part in str(error.value)


def test_max_model_len_beyond_the_models_limit():
    assert wanted_max_model_len(EngineConfig(), MODEL) == 8192
    assert wanted_max_model_len(EngineConfig(max_model_len=8192), MODEL) == 8192
    with pytest.raises(ValueError, match="max_model_len must be at most the model's 8192 positions; got 8193"):
        wanted_max_model_len(EngineConfig(max_model_len=8193), MODEL)


def test_format_bytes():
    assert [format_bytes(n) for n in (3 << 10, 20 << 20, 3 << 29)] == ["3.0 KiB", "20.0 MiB", "1.50 GiB"]


# -- the arena ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_blocks", [1, 2, 7, 8, 9, 100, 1000, 10**6])
def test_slabs_lose_little_of_the_limit(max_blocks):
    layout = KVLayout.choose(
        num_layers=32, num_kv_heads=8, block_size=16, head_dim=128, dtype=np.float16, max_blocks=max_blocks
    )
    arena = KVArena(layout, FakeBackend(), max_blocks)
    assert 7 / 8 * max_blocks < arena.max_blocks <= max_blocks
    assert layout.bytes_per_slab <= 128 << 20
    assert layout.blocks_per_slab == 1 << layout.slab_shift


def test_a_failed_growth_is_tried_again_later_not_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cupaged.memory.arena.time.monotonic", lambda: now[0])
    backend = FakeBackend()
    arena = KVArena(LAYOUT, backend, max_blocks=2)
    assert arena.grow() == 1
    backend.out_of_memory = True
    assert arena.grow() == 0
    backend.out_of_memory = False
    now[0] += 0.5
    assert arena.grow() == 0
    now[0] += 0.6
    assert arena.grow() == 1
    assert arena.grow() == 0


def test_too_little_memory_for_the_first_slab_or_for_all_of_them(monkeypatch):
    monkeypatch.setattr(FakeBackend, "memory_info", lambda self: (1 << 20, 1 << 30))
    original = FakeBackend.empty

    def fail_when_full(self, shape, dtype):
        self.taken = getattr(self, "taken", 0) + (len(shape) == 6)
        self.out_of_memory = self.taken > limit
        return original(self, shape, dtype)

    monkeypatch.setattr(FakeBackend, "empty", fail_when_full)
    limit = 0
    with pytest.raises(OutOfMemoryError, match=r"wants 1.0 KiB at the start, and 1.0 MiB are free"):
        make_engine(num_blocks=64)
    limit = 3
    assert make_engine(num_blocks=64).stats().num_slabs == 1
    with pytest.raises(OutOfMemoryError, match=r"wants 8.0 KiB at the start"):
        make_engine(num_blocks=64, preallocate=True)
    limit = 8
    assert make_engine(num_blocks=64, preallocate=True).stats().num_slabs == 8
