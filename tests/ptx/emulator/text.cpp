// Operands as PTX writes them: lists, immediates, vectors, addresses.
#include <cctype>

#include "machine.h"
#include "parsed.h"

namespace ptx {

// Splits at the top level of brackets if `nested`, and strips blanks.
std::vector<std::string> split(std::string_view text, char at, bool nested) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : text) {
    if (nested) depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == at && depth == 0) parts.emplace_back();
    else if (!std::isspace(static_cast<unsigned char>(c))) parts.back() += c;
  }
  return parts;
}

int64_t immediate(const std::string& text, int bytes) {
  if (text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'F' || text[1] == 'd' || text[1] == 'D')) {
    const bool is_double = text[1] == 'd' || text[1] == 'D';
    const uint64_t bits = std::stoull(text.substr(2), nullptr, 16);
    if (is_double != (bytes == 8)) throw Failure("an immediate of another width: " + text);
    return static_cast<int64_t>(bits);
  }
  std::string digits = text;
  if (!digits.empty() && digits.back() == 'U') digits.pop_back();
  size_t used = 0;
  const bool negative = digits[0] == '-';
  const uint64_t value = std::stoull(digits.substr(negative), &used, 0);
  if (used + negative != digits.size()) throw Failure("not an immediate: " + text);
  if (digits == "1.0") return 1;
  return static_cast<int64_t>(negative ? -value : value);
}

std::vector<std::string> Parsed::elements(size_t operand) const {
  const std::string& text = operands.at(operand);
  if (text[0] != '{') return {text};
  return split(std::string_view(text).substr(1, text.size() - 2), ',', false);
}

Place Parsed::address(size_t operand, int bytes) {
  const std::string& text = operands.at(operand);
  if (text[0] != '[') throw Failure("not an address: " + text);
  const auto parts = split(std::string_view(text).substr(1, text.size() - 2), '+', false);
  out.offset = parts.size() > 1 ? immediate(parts[1], 8) : 0;
  return place(parts[0], bytes);
}

}  // namespace ptx
