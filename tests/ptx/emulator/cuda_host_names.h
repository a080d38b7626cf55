// What the C interfaces in tests/cpu/cuda_host take from their shim, for them to be compiled over the real headers.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace cuda_host {

extern int num_sms;
inline void* const kStream = reinterpret_cast<void*>(0x57ea);  // what launchers are given, and have to launch on
extern bool descending;  // CTAs and warps run backwards
extern std::vector<std::pair<const uint8_t*, int>> prefetched;  // by the launch: where from, bytes

}  // namespace cuda_host
