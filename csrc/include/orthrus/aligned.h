// Whether pointers allow the wide accesses of a kernel: a misaligned access would end the device's whole context.
#pragma once
#include <cstdint>

namespace orthrus::cuda {

// Null pointers count as aligned.
template <typename... T>
bool aligned(uintptr_t bytes, const T*... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % bytes == 0;
}

}  // namespace orthrus::cuda
