"""What ``bench_auto`` compares with."""

from bench.bench_auto import best_in_other_rounds


def test_the_best_fixed_plan_of_a_round_is_chosen_by_the_other_half():
    assert best_in_other_rounds({"lucky by turns": [1, 3, 1, 3], "steady": [2, 2, 2, 2]}) == [1, 2, 1, 2]
    assert best_in_other_rounds({"a": [1.0], "b": [2.0]}) == [2.0]
