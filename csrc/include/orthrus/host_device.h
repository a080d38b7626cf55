// Functions for kernels and hosts alike.
#pragma once

#if defined(__CUDACC__)
#define ORTHRUS_HD __host__ __device__ __forceinline__
#else
#define ORTHRUS_HD inline
#endif
