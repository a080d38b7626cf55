// Runs grids from beginning to end, and prints reports.
#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "cuda_host_names.h"
#include "run.h"

namespace ptx {
namespace {

uint32_t num_launches = 0;
std::set<std::pair<const Instruction*, std::string>> reported;

std::string place_of(const Warp& w, const Instruction& i, int lane) {
  const Launch& launch = *w.cta->launch;
  std::ostringstream s;
  const auto file = launch.module->files.find(i.loc_file);
  s << launch.kernel->name << "\n  line " << i.line << ": " << i.text.substr(0, 160);
  if (file != launch.module->files.end()) s << "\n  " << file->second << ":" << i.loc_line;
  s << "\n  block " << w.cta->id[0] << " " << w.cta->id[1] << " " << w.cta->id[2] << ", thread "
    << w.index * 32 + lane;
  return s.str();
}

}  // namespace

void report(Warp& w, const Instruction& i, int lane, const std::string& what) {
  ++num_reports;
  if (reported.insert({&i, what}).second && reported.size() < 50)
    std::fprintf(stderr, "ptx: %s\n  %s\n", what.c_str(), place_of(w, i, lane).c_str());
}
void fail(Warp& w, const Instruction& i, int lane, const std::string& what) {
  throw Failure(what + "\n  " + place_of(w, i, lane));
}

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) throw Failure("cannot read " + path);
  return text.str();
}
const Module& load(const std::string& path) {
  static std::map<std::string, Module> modules;
  const auto found = modules.find(path);
  return found != modules.end() ? found->second : modules.emplace(path, parse(read_file(path))).first->second;
}

void launch(const Module& module, const std::string& name, const uint32_t (&grid)[3], uint32_t threads,
            uint32_t dynamic_shared, std::vector<uint8_t> params, bool pdl, uint32_t cluster) {
  const auto found = module.kernels.find(name);
  if (found == module.kernels.end()) throw Failure("no kernel " + name);
  const Kernel& kernel = *found->second;
  if (params.size() != kernel.param_bytes) throw Failure("parameters of another size");
  if (threads > static_cast<uint32_t>(kernel.max_threads)) throw Failure("more threads than the kernel is for");
  if (kernel.required_threads && threads != static_cast<uint32_t>(kernel.required_threads))
    throw Failure("not the threads that the kernel is for");
  if (kernel.static_shared + dynamic_shared > 227 * 1024) throw Failure("too much shared memory");
  if (cluster < 1 || cluster > 8 || grid[0] % cluster) throw Failure("a grid that clusters do not cover");
  Launch l{&module, &kernel, modes, Order::kForward, {grid[0], grid[1], grid[2]}, cluster, threads,
           dynamic_shared, pdl || kernel.has_pdl, {}, {}, 0, before_wait};
  if (counts_traffic) l.traffic = &traffic[name];  // forwards, the order in which diverged lanes reconverge soonest
  else if (modes.random || cuda_host::descending) l.order = modes.random ? Order::kRandom : Order::kBackward;
  l.random.seed(modes.seed + num_launches);
  l.params.resize(params.size() / sizeof(Line) + 1);
  std::memcpy(l.params.data(), params.data(), params.size());
  std::vector<std::array<uint32_t, 3>> ids;
  for (uint32_t z = 0; z < grid[2]; ++z)
    for (uint32_t y = 0; y < grid[1]; ++y)
      for (uint32_t x = 0; x < grid[0]; x += cluster) ids.push_back({x, y, z});
  if (cuda_host::last_cluster_only) ids = {ids.back()};
  if (l.order == Order::kBackward) std::reverse(ids.begin(), ids.end());
  if (l.order == Order::kRandom) std::shuffle(ids.begin(), ids.end(), l.random);
  std::vector<std::unique_ptr<Cluster>> running;
  const int reports_before = num_reports;
  for (size_t next = 0; next < ids.size() || !running.empty();) {
    while (next < ids.size() && running.size() < static_cast<size_t>(std::max(1, modes.concurrent))) {
      running.push_back(std::make_unique<Cluster>(l, ids[next]));
      ++next;
    }
    const size_t which = running.size() > 1 ? l.random() % running.size() : 0;
    if (running[which]->run(modes.concurrent <= 1)) running.erase(running.begin() + static_cast<long>(which));
  }
  if (l.traffic) l.traffic->end_launch(l);
  ++num_launches;
  num_instructions += l.clock;
  launched.insert(name);
  if (num_reports != reports_before) throw Failure("see the reports above");
}

}  // namespace ptx
