// Modules, launches and their reports, between the C interface, the CUDA runtime and the machine.
#pragma once
#include <set>

#include "traffic.h"

namespace ptx {

std::string read_file(const std::string& path);
const Module& load(const std::string& path);
// Runs a grid to its end. Throws Failure.
void launch(const Module& module, const std::string& kernel, const uint32_t (&grid)[3], uint32_t threads,
            uint32_t dynamic_shared, std::vector<uint8_t> params, bool pdl, uint32_t cluster = 1);

inline Modes modes;
inline std::vector<std::pair<uintptr_t, uintptr_t>> before_wait;
inline std::vector<const Module*> modules;
inline int architecture = 80;

inline int num_reports = 0;
inline uint64_t num_instructions = 0;
inline std::set<std::string> launched;
inline bool counts_traffic = false;
inline std::map<std::string, Traffic> traffic;  // by kernel

}  // namespace ptx
