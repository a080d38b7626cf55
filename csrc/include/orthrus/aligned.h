// Whether pointers allow the wide accesses that a kernel makes: on a device another one ends the whole context.
#pragma once
#include <cstdint>

namespace orthrus::cuda {

// Of each of them; null is.
template <typename... T>
bool aligned(uintptr_t bytes, const T*... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % bytes == 0;
}

}  // namespace orthrus::cuda
