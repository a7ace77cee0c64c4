"""benchmarks/configs hold the shapes that they are named after."""

from pathlib import Path

import pytest

from cupaged.weights.dummy import read_config
from cupaged.weights.packing import parameter_shapes

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


@pytest.mark.parametrize(
    ("name", "num_parameters"),  # as their publishers count them
    [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("smollm2-135m", 134_515_008)],
)
def test_number_of_parameters(name, num_parameters):
    total = 0
    for rows, *columns in parameter_shapes(read_config(CONFIGS / f"{name}.json")).values():
        total += rows * (columns[0] if columns else 1)
    assert total == num_parameters


def test_every_config_is_checked():
    assert len(list(CONFIGS.iterdir())) == 3
