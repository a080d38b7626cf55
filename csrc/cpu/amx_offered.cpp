// Whether this processor has AMX and the system lets the process use it.
#include "variant.h"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace orthrus::cpu::amx_bf16 {

// Tiles need the system's permission, which this requests: it covers all threads and children of the process, and
// makes signal frames 8 KB larger (it is refused where a signal stack is too small for that).
bool tiles_offered() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace orthrus::cpu::amx_bf16
