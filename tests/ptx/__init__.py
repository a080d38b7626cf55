"""What nvcc and Triton emit, run on the CPU: an emulator of PTX, as far as the kernels here use it.

tests/ptx/emulator parses PTX and runs its instructions lane by lane; beneath csrc/cuda's own launchers it takes the
place of the CUDA runtime. plugin.py and triton_plugin.py have the tests of tests/cpu and tests/interpret run so, and
test_kernels.py starts them: ``python tools/test.py ptx``. One file of them:
``python -m tests.ptx 90a tests/cpu/test_consensus.py``.

Modelled: copies (cp.async, bulk, boxes of tensors) and products of wgmma that happen as late as the kernel's waits
allow; mbarriers with their phases, arrivals and bytes; named barriers; clusters, with their barrier, copies to all of
them and arrivals at another's mbarriers; convergence, down to lanes that run apart; the swizzle of shared memory,
matrix descriptors and fragments. CTAs, warps, lanes and copies run forwards, backwards, or in a random order, several
CTAs interleaved.

Reported, with the line of PTX and of the source: accesses out of the bounds of a tensor, of shared memory or of
parameters, or misaligned; shared memory that nobody has written or that a copy in flight writes; a write to operands of
a product in flight; two warps at one place of shared memory that no barrier or mbarrier orders, unless both write the
same; operands of wgmma and mbarriers without the fence between proxies, and copies to where threads have read without
it; global memory touched ahead of griddepcontrol.wait, weights excepted; shuffles from lanes that take no part;
barriers that nobody can pass; copies or products left behind at the end. Registers and sums that nobody has written, or
waited for, are NaN.

Counted, if asked for (``--traffic``): instructions by unit, sectors and lines of global memory, wavefronts of shared
memory, each beside the least that would do. ``python -m tests.ptx.traffic``: all kernels at the shapes of a real model.

Not modelled: SASS, what ptxas makes of PTX and how the hardware runs it; the weak order of memory between CTAs, which
see each other's writes at once, and in a cluster, to all of which any arrival at an mbarrier is a release; races in
global memory, between lanes of one warp, or with what warps beyond the 24th of a cluster have read; kernels that
overlap under PDL, where the rule alone is checked; time. Tensor cores sum in double and round once; ex2, lg2, rsqrt,
rcp and div are correctly rounded or the C library's: a card's last bits differ.
"""
