"""What the host reads of the slots: one piece of memory, and the new tokens out of a ring."""

import torch

from orthrus_rt import state as st
from orthrus_rt.acceptance import Outcome
from orthrus_rt.results import Result, SlotResults


def test_new_tokens_of_a_ring_that_wrapped():
    results = SlotResults(3, 8, "cpu")
    results.memory.fill_(-9)
    views = results.views
    for name, value in (("finish", st.RUNNING), ("num_output", 21), ("num_verified", 7), ("num_accepted", 3)):
        views[name][1] = value
    for i in range(13, 21):
        views["output"][1, i % 8] = 100 + i
    for num_seen in range(13, 22):  # from a whole ring of new tokens, which wraps, to none
        assert results.read([(1, num_seen)]) == [Result(st.RUNNING, 7, 3, [100 + i for i in range(num_seen, 21)])]
    views["num_output"][1] = 24  # where a turn of the ring ends
    assert [r.tokens for r in results.read([(1, 21), (1, 24)])] == [[113, 114, 115], []]
    views["num_output"][1] = 21
    assert results.read([]) == []
    assert views["output"].is_contiguous() and int((results.memory == -9).sum()) == 2 * (4 + 8)


def test_one_copy_carries_everything():
    source, target = SlotResults(2, 4, "cpu"), SlotResults(2, 4, "cpu")
    source.memory.copy_(torch.arange(len(source.memory)))
    target.memory.copy_(source.memory)
    assert all(torch.equal(target.views[name], view) for name, view in source.views.items())


def test_an_end_among_the_drafts_is_no_rejection():
    assert Result(st.RUNNING, 7, 3, [1, 2, 3, 4]).outcome() == Outcome(7, 3)
    stopped_by_the_choice_after_a_rejected_draft = Result(st.STOP, 7, 3, [1, 2, 3, 4])
    assert stopped_by_the_choice_after_a_rejected_draft.outcome() == Outcome(7, 3)
    assert Result(st.LENGTH, 7, 3, [1, 2, 3]).outcome() == Outcome(7, 3, cut=True)
    assert Result(st.RUNNING, 0, 0, [1]).outcome(fresh=True) == Outcome(0, 0, fresh=True)
    outcomes = Outcome(7, 3), Outcome(7, 3, cut=True), Outcome(7, 0, cut=True)
    assert [out.num_tokens for out in outcomes] == [4, 3, 1]
