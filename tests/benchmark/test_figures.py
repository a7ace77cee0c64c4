"""Spreads, distributions and tables."""

from cupaged.benchmark.figures import distribution, spread, table


def test_spread():
    assert spread([3.0, 1.0, 8.0, 2.0]) == {"median": 2.5, "min": 1.0, "max": 8.0, "count": 4}
    assert spread([]) is None


def test_distribution():
    figure = distribution([float(i) for i in range(101)])
    assert figure == {"p50": 50.0, "p99": 99.0, "mean": 50.0, "max": 100.0, "count": 101}
    assert distribution([]) is None


def test_table():
    rows = [
        {"name": "a", "time": spread([1.0, 2.0, 30.0]), "count": 7},
        {"name": "long name", "time": None, "count": 123_456},
        {"name": "c", "time": distribution([1234.5]), "count": 0.25},
    ]
    assert table([("name", "name"), ("ms", "time"), ("n", "count"), ("absent", "none")], rows).splitlines() == [
        "name                         ms        n  absent",
        "a          2.000 (1.000..30.00)        7       -",
        "long name                     -  123,456       -",
        "c                 1,234 / 1,234    0.250       -",
    ]
