// Parses PTX text to kernels: directives, scopes of registers and labels. Decoders by family handle the instructions.
#include <algorithm>
#include <cctype>
#include <utility>

#include "machine.h"
#include "parsed.h"

namespace ptx {

namespace {

bool decode(Parsed& p) {
  for (const auto family : {decode_arithmetic, decode_bits, decode_memory, decode_copies, decode_ordering,
                            decode_collective, decode_matrices})
    if (family(p)) return true;
  return false;
}

struct Register {
  Place place;
  int bytes;
};
struct Symbol {
  bool param;
  int64_t offset;
};

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Module run() {
    while (next_line()) {
      if (line_.rfind(".target", 0) == 0) module_.arch = std::stoi(line_.substr(line_.find("sm_") + 3));
      if (line_.rfind(".file", 0) == 0) {
        const auto quote = line_.find('"');
        module_.files[std::stoi(line_.substr(5))] = line_.substr(quote + 1, line_.rfind('"') - quote - 1);
      }
      if (line_.rfind(".extern .shared", 0) == 0) {
        dynamic_name_ = name_of_array(line_);
        dynamic_align_ = alignment_of(line_);
      }
      if (line_.find(".entry") != std::string::npos) parse_kernel();
    }
    return std::move(module_);
  }

 private:
  static std::string strip(std::string line) {
    if (const auto comment = line.find("//"); comment != std::string::npos) line.resize(comment);
    const auto begin = line.find_first_not_of(" \t\r"), end = line.find_last_not_of(" \t\r");
    return begin == std::string::npos ? "" : line.substr(begin, end - begin + 1);
  }
  bool next_line() {
    do {
      if (at_ >= text_.size()) return false;
      const auto end = std::min(text_.find('\n', at_), text_.size());
      line_ = strip(text_.substr(at_, end - at_));
      at_ = end + 1;
      ++number_;
    } while (line_.empty());
    return true;
  }
  static std::string name_of_array(const std::string& line) {
    const auto bracket = line.find('[');
    const auto begin = line.find_last_of(" \t", bracket) + 1;
    return line.substr(begin, bracket - begin);
  }
  static uint32_t alignment_of(const std::string& line) {
    const auto at = line.find(".align ");
    return at == std::string::npos ? 1 : std::stoi(line.substr(at + 7));
  }
  static uint32_t size_of_array(const std::string& line) {
    const auto bracket = line.find('[');
    return std::stoi(line.substr(bracket + 1));
  }
  static uint32_t round_up(uint32_t n, uint32_t to) { return (n + to - 1) / to * to; }

  void parse_kernel() {
    auto owned = std::make_unique<Kernel>();
    kernel_ = owned.get();
    const auto begin = line_.find(".entry") + 7;
    kernel_->name = line_.substr(begin, line_.find('(') - begin);
    scopes_.assign(1, {});
    symbols_.clear();
    constants_.clear();
    labels_.clear();
    pending_.clear();
    kernel_->file_bytes = 256;  // place 0 stands for none
    bool in_body = false;
    std::vector<std::string> labels;
    while (next_line()) {
      if (!in_body && line_ == "{") {
        in_body = true;
        continue;
      }
      if (!in_body) {
        if (line_.rfind(".param", 0) == 0) add_param();
        if (line_.rfind(".maxntid", 0) == 0) kernel_->max_threads = std::stoi(line_.substr(8));
        if (line_.rfind(".reqntid", 0) == 0) kernel_->required_threads = std::stoi(line_.substr(8));
        continue;
      }
      // Blocks of inline assembly share lines with instructions.
      std::string rest = line_;
      bool ended = false;
      while (!(rest = strip(rest)).empty()) {
        if (rest[0] == '{') {
          scopes_.emplace_back();
          rest.erase(0, 1);
        } else if (rest[0] == '}') {
          resolve_labels();
          if (scopes_.size() == 1) {
            ended = true;
            break;
          }
          scopes_.pop_back();
          rest.erase(0, 1);
        } else if (rest[0] == '.') {
          directive(rest);
          break;
        } else if (const auto colon = label_end(rest); colon != std::string::npos) {
          labels_.push_back({rest.substr(0, colon), static_cast<uint32_t>(kernel_->code.size()), scopes_.size()});
          label_here_ = true;
          rest.erase(0, colon + 1);
        } else {
          auto end = rest.find(';');
          while (end == std::string::npos) {
            if (!next_line()) throw Failure("an instruction without an end");
            rest += " " + line_;
            end = rest.find(';');
          }
          instruction(rest.substr(0, end));
          rest.erase(0, end + 1);
        }
      }
      if (ended) break;
    }
    finish();
    module_.kernels[kernel_->name] = std::move(owned);
  }

  static size_t label_end(const std::string& text) {
    auto in_name = [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '$'; };
    size_t k = 0;
    while (k < text.size() && in_name(static_cast<unsigned char>(text[k]))) ++k;
    const bool ends = k > 0 && k < text.size() && text[k] == ':' && (k + 1 == text.size() || text[k + 1] != ':');
    return ends ? k : std::string::npos;
  }

  void add_param() {
    uint32_t bytes, align;
    std::string name;
    if (line_.find('[') != std::string::npos) {
      name = name_of_array(line_);
      bytes = size_of_array(line_);
      align = alignment_of(line_);
    } else {
      const auto words = split_words(line_);
      bytes = align = type_bytes(words[1].substr(1));
      name = words.back();
    }
    if (name.back() == ',' || name.back() == ')') name.pop_back();
    kernel_->param_bytes = round_up(kernel_->param_bytes, align);
    kernel_->param_offsets.push_back(kernel_->param_bytes);
    symbols_[name] = {true, kernel_->param_bytes};
    kernel_->param_bytes += bytes;
  }
  static std::vector<std::string> split_words(const std::string& line) {
    std::vector<std::string> words;
    std::string word;
    for (char c : line + " ") {
      if (!std::isspace(static_cast<unsigned char>(c))) word += c;
      else if (!word.empty()) words.push_back(std::move(word)), word.clear();
    }
    return words;
  }

  void directive(const std::string& text) {
    if (text.rfind(".reg", 0) == 0) {
      const auto words = split_words(text.substr(0, text.find(';')));
      const int bytes = register_bytes(words[1].substr(1));
      std::string names;
      for (size_t k = 2; k < words.size(); ++k) names += words[k];
      for (const auto& name : split(names, ',', false)) {
        const auto angle = name.find('<');
        if (angle == std::string::npos) {
          scopes_.back()[name] = add_register(bytes);
        } else {
          const int count = std::stoi(name.substr(angle + 1));
          for (int k = 0; k < count; ++k)
            scopes_.back()[name.substr(0, angle) + std::to_string(k)] = add_register(bytes);
        }
      }
    } else if (text.rfind(".shared", 0) == 0) {
      kernel_->static_shared = round_up(kernel_->static_shared, alignment_of(text));
      symbols_[name_of_array(text)] = {false, kSharedBegin + kernel_->static_shared};
      kernel_->static_shared += size_of_array(text);
    } else if (text.rfind(".loc", 0) == 0) {
      const auto words = split_words(text);
      loc_file_ = std::stoi(words[1]);
      loc_line_ = std::stoi(words[2]);
    } else if (text.rfind(".pragma", 0) != 0) {
      throw Failure("a directive that the emulator does not know: " + text);
    }
  }
  Register add_register(int bytes) {
    const Register r{kernel_->file_bytes, bytes};
    kernel_->file_bytes += 32 * bytes;
    return r;
  }
  const Register* find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return &found->second;
    return nullptr;
  }

  Place constant(Preset kind, int64_t value, int bytes) {
    auto [found, is_new] = constants_.try_emplace({static_cast<int>(kind), value, bytes}, kernel_->constants.size());
    // Constants lie behind all registers, whose number is not known yet, so finish() shifts their places.
    if (is_new) {
      const Place place = kConstants + constant_bytes_;
      constant_bytes_ += 32 * bytes;
      kernel_->constants.push_back({kind, value, place, bytes});
    }
    return kernel_->constants[found->second].place;
  }
  Place place(const std::string& text, int bytes) {
    if (const Register* r = find_register(text)) {
      if (r->bytes != bytes) throw Failure(text + " is a register of another width, line " + std::to_string(number_));
      return r->place;
    }
    static const std::map<std::string, Preset> special = {
        {"%tid", Preset::kTid}, {"%ctaid", Preset::kCtaid}, {"%ntid", Preset::kNtid}, {"%nctaid", Preset::kNctaid}};
    if (text[0] == '%') {
      const auto dot = text.find('.');
      if (text == "%laneid") return constant(Preset::kLane, 0, bytes);
      const auto found = special.find(text.substr(0, dot));
      if (found == special.end() || dot == std::string::npos) throw Failure("no register " + text);
      return constant(found->second, text[dot + 1] - 'x', bytes);
    }
    if (text == dynamic_name_) {
      kernel_->dynamic_align = std::max(kernel_->dynamic_align, dynamic_align_);
      return constant(Preset::kValue, kDynamic, bytes);
    }
    if (const auto found = symbols_.find(text); found != symbols_.end())
      return constant(found->second.param ? Preset::kParam : Preset::kValue, found->second.offset, bytes);
    return constant(Preset::kValue, immediate(text, bytes), bytes);
  }

  void instruction(std::string text) {
    Instruction out;
    out.text = text = strip(text);
    out.line = number_;
    out.loc_file = loc_file_;
    out.loc_line = loc_line_;
    out.is_leader = std::exchange(label_here_, false);
    if (text[0] == '@') {
      const auto end = text.find_first_of(" \t");
      out.guard_negated = text[1] == '!';
      out.guard = place(text.substr(out.guard_negated ? 2 : 1, end - (out.guard_negated ? 2 : 1)), 4);
      text = strip(text.substr(end));
    }
    const auto end = text.find_first_of(" \t");
    Parsed p{split(text.substr(0, end), '.', false),
             {},
             out,
             *kernel_,
             [this](const std::string& t, int bytes) { return place(t, bytes); },
             [this](const std::string& t) {
               const Register* r = find_register(t);
               return r ? r->bytes : 0;
             }};
    if (end != std::string::npos) p.operands = split(text.substr(end), ',', true);
    const std::string& op = p.parts[0];
    if (op == "bra") {
      out.kind = Kind::kBranch;
      pending_.push_back({static_cast<uint32_t>(kernel_->code.size()), p.operands[0], scopes_.size()});
    } else if (op == "ret" || op == "exit") {
      out.kind = Kind::kExit;
    } else if (op == "trap") {
      out.run = [](Warp& w, const Instruction& i, Mask m) { fail(w, i, std::countr_zero(m), "trap"); };
    } else if (!decode(p)) {
      throw Failure("an instruction that the emulator does not know: " + text);
    }
    classify(p);
    kernel_->has_wgmma |= op == "wgmma";
    kernel_->has_pdl |= op == "griddepcontrol" && p.has("wait");
    kernel_->code.push_back(std::move(out));
  }

  // At the end of a scope: its labels are visible only inside it.
  void resolve_labels() {
    const size_t depth = scopes_.size();
    auto rest = std::partition(pending_.begin(), pending_.end(), [&](const Jump& jump) {
      for (auto label = labels_.rbegin(); label != labels_.rend(); ++label)
        if (label->name == jump.name && label->depth == depth) {
          kernel_->code[jump.from].target = label->at;
          return false;
        }
      return true;
    });
    pending_.erase(rest, pending_.end());
    std::erase_if(labels_, [&](const Label& label) { return label.depth == depth; });
  }

  void finish() {
    if (!pending_.empty()) throw Failure("no label " + pending_[0].name);
    Kernel& k = *kernel_;
    Instruction end;
    end.kind = Kind::kExit;
    end.is_leader = true;
    end.text = "end";
    k.code.push_back(end);
    for (const auto& i : std::vector<Instruction>(k.code))
      if (i.kind == Kind::kBranch) k.code[i.target].is_leader = true;
    k.first_constant = round_up(k.file_bytes, 64);
    auto shift = [&](Place& place) {
      if (place >= kConstants) place = place - kConstants + k.first_constant;
    };
    for (auto& i : k.code) {
      for (Place* place : {&i.d, &i.a, &i.b, &i.c, &i.mask, &i.guard}) shift(*place);
      for (auto& place : i.list) shift(place);
      for (auto& place : i.list2) shift(place);
    }
    const uint32_t dynamic = kSharedBegin + round_up(k.static_shared, k.dynamic_align);
    for (auto& c : k.constants) {
      shift(c.place);
      if (c.kind == Preset::kValue && c.value == kDynamic) c.value = dynamic;
    }
    k.file_bytes = round_up(k.first_constant + constant_bytes_, 64);
    constant_bytes_ = 0;
  }

  static constexpr Place kConstants = 1u << 30;
  static constexpr int64_t kDynamic = 0x64796e616d6963;

  struct Label {
    std::string name;
    uint32_t at;
    size_t depth;
  };
  struct Jump {
    uint32_t from;
    std::string name;
    size_t depth;
  };
  const std::string& text_;
  size_t at_ = 0;
  int number_ = 0, loc_file_ = 0, loc_line_ = 0;
  std::string line_, dynamic_name_;
  uint32_t dynamic_align_ = 1, constant_bytes_ = 0;
  bool label_here_ = false;
  Module module_;
  Kernel* kernel_ = nullptr;
  std::vector<std::map<std::string, Register>> scopes_;
  std::map<std::string, Symbol> symbols_;
  std::map<std::tuple<int, int64_t, int>, size_t> constants_;
  std::vector<Label> labels_;
  std::vector<Jump> pending_;
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
