"""Builds the kernels for the host ahead of the tests; needs no package."""

from tests.cpu import cuda_host

if cuda_host.compiler():
    cuda_host.library()
    cuda_host.row_linear_library()
