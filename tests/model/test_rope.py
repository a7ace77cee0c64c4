import json
from pathlib import Path

import numpy as np
import pytest

from cupaged.config import RopeConfig
from cupaged.models.rope import cos_sin_table, inverse_frequencies

GOLDEN = np.load(Path(__file__).parent / "golden" / "rope.npz")
CASES = json.loads(str(GOLDEN["cases"]))
HEAD_DIM = 128


def rope_config(parameters: dict) -> RopeConfig:
    fields = dict(parameters)
    rotary_dim = int(fields.pop("partial_rotary_factor", 0) * HEAD_DIM)
    return RopeConfig(fields.pop("rope_type"), fields.pop("rope_theta"), rotary_dim=rotary_dim, **fields)


@pytest.mark.parametrize("name", CASES)
def test_tables_match_transformers(name):
    positions, expected = GOLDEN["positions"], GOLDEN[name]
    table = cos_sin_table(rope_config(CASES[name]), HEAD_DIM, int(positions[-1]) + 1)
    assert table.dtype == np.float32
    assert table.shape == (positions[-1] + 1, expected.shape[1])
    # transformers rounds to float32: the frequency (a power, a division and, for llama3's blend, six steps more), the
    # angle, and cosine and sine.
    error = np.abs(table[positions] - expected)
    frequencies = np.tile(inverse_frequencies(rope_config(CASES[name]), expected.shape[1]), 2)
    bound = 2.0**-24 * (9 * positions[:, None] * frequencies + 2)
    assert (error <= bound).all(), f"error over bound: {(error / bound).max():.2f}"


def test_scaled_tables_differ_from_plain_ones():
    plain = inverse_frequencies(RopeConfig(theta=1e4), HEAD_DIM)
    for kind in ("linear", "llama3", "yarn"):
        rope = RopeConfig(kind, 1e4, factor=8.0, original_max_position_embeddings=256)
        scaled = inverse_frequencies(rope, HEAD_DIM)
        assert scaled[-1] == pytest.approx(plain[-1] / 8)
        assert scaled[0] == pytest.approx(plain[0] / 8 if kind == "linear" else plain[0])


def test_yarn_with_equal_corners_is_a_step():
    rope = RopeConfig("yarn", 1e4, factor=4.0, original_max_position_embeddings=4)
    plain, scaled = inverse_frequencies(RopeConfig(theta=1e4), 64), inverse_frequencies(rope, 64)
    assert scaled[0] == plain[0]
    assert np.allclose(scaled[1:], plain[1:] / 4, rtol=1e-12)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"rope\.kind must be default, .*got 'longrope'"):
        cos_sin_table(RopeConfig("longrope"), 64, 4)
