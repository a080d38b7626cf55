// Marks functions that both kernels and host code call.
#pragma once

#if defined(__CUDACC__)
#define ORTHRUS_HD __host__ __device__ __forceinline__
#else
#define ORTHRUS_HD inline
#endif
