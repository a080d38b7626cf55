"""Triton implementations of the small ops and a portable attention: one file per op, nothing of the engine. Besides
filter_cut.py, the search of process_logits, pdl.py, how they are launched, and sum_words.py, by which bandwidth is
measured.

Every kernel is deterministic, row-invariant (tile shapes follow from the model's shape, never from the number
of rows) and graph-safe: grids depend on host integers only. None lets products and sums be contracted, not even
where there are none: Triton 3.9 warns where a launch does not say. Correct under Triton 3.6 ... 3.9.
"""
