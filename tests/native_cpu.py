"""Shared by the tests of the native CPU ops: thread counts, tensors, the rounding bound."""

import contextlib
import resource

import torch

ELEMENT = torch.bfloat16  # see the fixture ``element``


class threads:
    """``with threads(n):`` runs ops on n threads."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)


class AddressSpace:
    """The process's address space at construction; ``with space.and_only(mebibytes):`` limits it to that much more."""

    def __init__(self):
        with open("/proc/self/statm") as file:
            self.used = int(file.read().split()[0]) * resource.getpagesize()

    @contextlib.contextmanager
    def and_only(self, mebibytes):
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (self.used + (mebibytes << 20), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def randn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(ELEMENT)


def poison(*shape, dtype=None):
    return torch.full(shape, torch.nan, dtype=dtype or ELEMENT)


def assert_rounded(got, want, slack=0.0):
    """``got`` is float64 ``want`` evaluated in fp32 (1e-6 relative, ``slack`` absolute), rounded once to its dtype."""
    bound = want.abs() * (torch.finfo(got.dtype).eps / 2 + 1e-6) + slack + 1e-38
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max()):.3g} times the bound"
