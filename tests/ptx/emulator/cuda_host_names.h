// What the C interfaces in tests/cpu/cuda_host take from their shim, so that they compile with the real headers.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace cuda_host {

extern int num_sms;
inline void* const kStream = reinterpret_cast<void*>(0x57ea);  // passed to launchers, which must launch on it
extern bool descending;  // CTAs and warps run backwards
extern "C" bool last_cluster_only;  // launches leave out all others
struct Prefetched {
  const uint8_t* source;
  int bytes;
  bool early;  // before the thread waited for earlier kernels
};
extern std::vector<Prefetched> prefetched;  // by the launch

}  // namespace cuda_host
