"""What ``bench_auto`` compares with."""

from bench.bench_auto import fastest


def test_the_fastest_plan_of_all_rounds_or_of_all_but_one():
    rates = {"lucky once": [1, 1, 9, 2.2, 2.1], "steady": [2, 2, 2, 2, 2]}
    assert fastest(rates) == "lucky once"
    assert [fastest(rates, but=i) for i in range(5)] == ["lucky once"] * 2 + ["steady"] * 3
    assert fastest({"a": [1.0], "b": [2.0]}, but=0) == "b"
