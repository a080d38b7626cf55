// What kernels and host code share: ORTHRUS_HD marks functions that both call.
#pragma once

#if defined(__CUDACC__)
#define ORTHRUS_HD __host__ __device__ __forceinline__
#else
#define ORTHRUS_HD inline
#endif

namespace orthrus {

// a / b, rounded up.
template <class A, class B>
ORTHRUS_HD constexpr auto div_up(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace orthrus
