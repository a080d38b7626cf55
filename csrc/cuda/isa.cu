// The choice between the wgmma kernels and the portable ones, for row_linear and dual_attn alike.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "orthrus/ops.h"

namespace orthrus::cuda {
namespace {

// Whether the module has the wgmma kernels; without them, Hopper also runs the portable ones.
#if defined(ORTHRUS_CUDA_ARCHS)
bool has_wgmma() { return std::strstr(ORTHRUS_CUDA_ARCHS, "90a"); }
#else
bool has_wgmma() { return true; }
#endif

std::atomic<bool> wants_sm80 = false;  // the portable variant on any device

}  // namespace

void read_environment() {
  const char* isa = std::getenv("ORTHRUS_CUDA_ISA");
  wants_sm80 = isa && !std::strcmp(isa, "sm80");
}

bool runs_wgmma(const DeviceInfo& device) {
  return device.major == 9 && device.minor == 0 && has_wgmma() && !wants_sm80;
}

const char* isa() {
  read_environment();
  const DeviceInfo device = device_info();
  if (device.error) return "none";
  return runs_wgmma(device) ? "sm90a" : "sm80";
}

}  // namespace orthrus::cuda
