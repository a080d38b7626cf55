// Whether pointers allow the wide accesses that a kernel makes: a misaligned one would end the device's whole context.
#pragma once
#include <cstdint>

namespace orthrus::cuda {

// A null pointer is.
template <typename... T>
bool aligned(uintptr_t bytes, const T*... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % bytes == 0;
}

}  // namespace orthrus::cuda
