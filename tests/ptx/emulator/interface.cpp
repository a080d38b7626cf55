// The functions that Python calls through ctypes.
#include <cstdio>

#include "orthrus/params.h"
#include "run.h"

namespace {

constexpr int kFailed = 999;

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ptx: %s\n", error.what());
    return kFailed;
  }
}

// Lets kernels read these tensors ahead of griddepcontrol.wait, or prefetch them to L2.
void allow_before_wait(const std::vector<const void*>& tensors) {
  ptx::before_wait.clear();
  for (const void* tensor : tensors)
    if (tensor) ptx::before_wait.push_back(ptx::bounds(reinterpret_cast<uintptr_t>(tensor), ptx::modes));
}

}  // namespace

extern "C" {

// Loads a module in which launches look for their kernels, for one architecture.
int ptx_load(const char* path) {
  return guarded([&] { ptx::modules.push_back(&ptx::load(path)); });
}
void ptx_architecture(int arch) { ptx::architecture = arch; }

// Unless `concurrent` is 0, the order of everything is drawn at random, with that many CTAs at once.
void ptx_random(int concurrent, unsigned seed) {
  ptx::modes.random = concurrent > 0;
  ptx::modes.concurrent = concurrent > 0 ? concurrent : 1;
  ptx::modes.seed = seed;
}
void ptx_mapped(int on) { ptx::modes.mapped = on; }
void ptx_limit(uint64_t instructions) { ptx::modes.limit = instructions; }

void ptx_before_wait(const void** tensors, int count) {
  allow_before_wait(std::vector<const void*>(tensors, tensors + count));
}
void ptx_before_row_linear(const orthrus::RowLinearParams* p) {
  allow_before_wait({p->weight, p->weight_diff, p->next_weight});
}
void ptx_before_qkv_commit(const orthrus::QkvCommitParams* p) {  // float32 has the same layout
  allow_before_wait({p->q_norm, p->k_norm, p->q_norm_diff, p->k_norm_diff});
}

// Runs a kernel of a file, with an 8-byte word per parameter. pdl: it may begin before the preceding grid has ended.
int ptx_launch(const char* path, const char* kernel, const uint32_t* grid, uint32_t threads, uint32_t dynamic_shared,
               const uint64_t* values, uint32_t count, int pdl) {
  return guarded([&] {
    const ptx::Module& module = ptx::load(path);
    const auto found = module.kernels.find(kernel);
    if (found == module.kernels.end()) throw ptx::Failure(std::string("no kernel ") + kernel);
    const auto& offsets = found->second->param_offsets;
    if (offsets.size() != count) throw ptx::Failure("another number of parameters");
    std::vector<uint8_t> params(found->second->param_bytes);
    for (uint32_t k = 0; k < count; ++k) {
      const uint32_t end = k + 1 < count ? offsets[k + 1] : found->second->param_bytes;
      std::memcpy(params.data() + offsets[k], values + k, std::min(8u, end - offsets[k]));
    }
    ptx::launch(module, kernel, {grid[0], grid[1], grid[2]}, threads, dynamic_shared, std::move(params), pdl);
  });
}

// Loads a module whose kernels replace others of the same names, until this is called with null.
int ptx_override(const char* path) {
  static std::unique_ptr<ptx::Module> replacing;
  if (replacing) ptx::modules.erase(ptx::modules.begin());
  replacing.reset();
  if (!path) return 0;
  return guarded([&] {
    replacing = std::make_unique<ptx::Module>(ptx::parse(ptx::read_file(path)));
    ptx::modules.insert(ptx::modules.begin(), replacing.get());
  });
}

// Starts counting memory traffic and issue slots from zero, or stops.
void ptx_traffic(int on) {
  ptx::counts_traffic = on;
  ptx::traffic.clear();
}
const char* ptx_traffic_json() {
  static std::string json;
  json = ptx::as_json(ptx::traffic);
  return json.c_str();
}

int ptx_reports() { return ptx::num_reports; }
uint64_t ptx_instructions() { return ptx::num_instructions; }
// Names of all kernels that have run, one per line.
const char* ptx_launched() {
  static std::string names;
  names.clear();
  for (const auto& name : ptx::launched) names += name + "\n";
  return names.c_str();
}
}
