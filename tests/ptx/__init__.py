"""Runs on the CPU what nvcc and Triton emit: an emulator of PTX, as far as the kernels here use it.

tests/ptx/emulator parses PTX and runs its instructions lane by lane. Below the launchers of csrc/cuda it replaces the
CUDA runtime. plugin.py and triton_plugin.py make the tests of tests/cpu and tests/interpret run this way, and
test_kernels.py starts them: ``python tools/test.py ptx``. To run a single file:
``python -m tests.ptx 90a tests/cpu/test_consensus.py``.

Modelled: copies (cp.async, bulk, boxes of tensors) and wgmma products that complete as late as the kernel's waits
allow; mbarriers with their phases, arrivals and bytes; named barriers; clusters, with their barrier, multicast copies
and arrivals at the mbarriers of other CTAs; convergence, including lanes that run apart; the swizzle of shared memory,
matrix descriptors and fragments. CTAs, warps, lanes and copies run forwards, backwards, or in a random order, with
several CTAs interleaved.

Reported, with the line of PTX and of the source: accesses that are misaligned or outside the bounds of a tensor, of
shared memory or of the parameters; shared memory that has not been written or that a copy in flight writes; a write to
operands of a product in flight; two warps that access one place of shared memory without a barrier or mbarrier to
order them, unless both write the same value; operands of wgmma and mbarriers without the fence between proxies, and
copies to memory that threads have read without it; access to global memory ahead of griddepcontrol.wait, weights
excepted; shuffles from lanes that do not take part; barriers that can never complete; copies or products left over at
the end. Registers and sums that have not been written, or not been waited for, are NaN.

Counted on request (``--traffic``): instructions by unit, sectors and lines of global memory, and wavefronts of shared
memory, with the minimum that would suffice. ``python -m tests.ptx.traffic`` covers all kernels at the shapes of a real
model.

Not modelled: SASS, which is what ptxas makes of PTX, and how the hardware runs it; the weak memory order between CTAs,
which see each other's writes at once; the same within a cluster, where every arrival at an mbarrier counts as a release
to all CTAs; races in global memory, between lanes of one warp, or with the reads of warps beyond the 24th of a cluster;
kernels that overlap under PDL, for which only the rule is checked; time. Tensor cores sum in double precision and round
once. ex2, lg2, rsqrt, rcp and div are correctly rounded or come from the C library, so the last bits of a GPU differ.
"""
