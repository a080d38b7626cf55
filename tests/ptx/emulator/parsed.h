// An instruction that is being decoded: the parts of its name, its operands as written, and the registers in scope.
#pragma once
#include <functional>

#include "program.h"

namespace ptx {

struct Parsed {
  std::vector<std::string> parts;     // of the name: "add", "rn", "f32"
  std::vector<std::string> operands;  // "%r1", "{%r1, %r2}", "[%rd1+8]", "p|q"
  Instruction& out;
  Kernel& kernel;
  std::function<Place(const std::string&, int)> place;        // of a register or an immediate, of that many bytes
  std::function<int(const std::string&)> width;               // of a register: 4 or 8; 0: not a register

  bool has(std::string_view part) const {
    for (const auto& p : parts)
      if (p == part) return true;
    return false;
  }
  const std::string& type() const { return parts.back(); }
  Place at(size_t operand, int bytes) const { return place(operands.at(operand), bytes); }
  std::vector<std::string> elements(size_t operand) const;    // of a vector, or the operand itself
  Place address(size_t operand, int bytes);                   // of [base+offset]; sets out.offset
  // Sets the places of d, a, b, c, registers of that many bytes (0: none). Returns whether a handler has been found.
  bool places(int d, int a, int b = 0, int c = 0) {
    out.d = at(0, d);
    out.a = at(1, a);
    if (b) out.b = at(2, b);
    if (c) out.c = at(3, c);
    return out.run != nullptr;
  }
};

// Bytes of a register that holds this type.
inline int register_bytes(std::string_view type) { return type.size() == 3 && type.substr(1) == "64" ? 8 : 4; }
inline int type_bytes(std::string_view type) {
  if (type == "pred") return 1;
  if (type == "bf16" || type == "f16") return 2;
  if (type.size() > 2 && type.substr(type.size() - 2) == "x2") return 4;
  return std::stoi(std::string(type.substr(1))) / 8;
}
std::vector<std::string> split(std::string_view text, char at, bool nested);
int64_t immediate(const std::string& text, int bytes);

}  // namespace ptx
