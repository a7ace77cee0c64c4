"""copy_words.cu: there and back, through page-locked memory where there is a GPU."""

import numpy as np
import pytest

from cupaged.kernels.copy_words import NUM_THREADS, copy_words


@pytest.mark.parametrize("num_words", [0, 1, 3, NUM_THREADS - 1, NUM_THREADS, NUM_THREADS + 1, 5000])
def test_words_go_up_and_come_down(runner, rng, num_words):
    words = rng.integers(2**32, size=num_words + 2, dtype=np.uint32)
    up, down = (runner.empty_host((num_words + 2,), np.uint32) for _ in range(2))
    up[:], down[:] = words, 7
    device = runner.array(np.full(num_words + 2, 9, np.uint32))

    copy_words(runner.address(device) + 4, runner.address(up) + 4, 4 * num_words)
    copy_words(runner.address(down) + 4, runner.address(device) + 4, 4 * num_words)

    found = runner.host(device)  # waits for both
    assert np.array_equal(found[1:-1], words[1:-1])
    assert found[[0, -1]].tolist() == [9, 9]
    assert np.array_equal(down[1:-1], words[1:-1])
    assert down[[0, -1]].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 8, 4), "^dst: must be a multiple of 4; got 2"),
        ((8, 6, 4), "^src: must be a multiple of 4; got 6"),
        ((8, 16, 5), "^num_bytes: must be a multiple of 4; got 5"),
    ],
)
def test_parts_of_words_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        copy_words(*arguments)
