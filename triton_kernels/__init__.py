"""Triton implementations of the small ops and a portable attention, one file per op and independent of the engine.
Other files: filter_cut.py, the search of process_logits; pdl.py, how kernels are launched; and sum_words.py, which
measures bandwidth.

Every kernel is deterministic, row-invariant (tile shapes follow from the model's shape, never from the number of rows)
and graph-safe: grids depend on host integers only. All launches forbid contracting products and sums, even where there
are none, as Triton 3.9 warns if a launch does not specify it. Correct under Triton 3.6 ... 3.9.
"""
