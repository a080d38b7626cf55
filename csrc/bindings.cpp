// Python face of the native module: the parameter structs as classes with keyword constructors,
// one launcher per op and backend, and build_info(). Shapes are validated in orthrus_rt/ops.py and checks.py.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/encode_weight.h"
#include "cpu/tape.h"
#include "orthrus/ops.h"

namespace py = pybind11;
using namespace orthrus;

namespace {

// A struct member as a Python property: pointers and enums travel as integers, nested structs as themselves.
template <typename Struct, typename Member>
void bind_field(py::class_<Struct>& cls, const char* name, Member Struct::*member) {
  if constexpr (std::is_pointer_v<Member> || std::is_enum_v<Member>) {
    using Integer = std::conditional_t<std::is_enum_v<Member>, int32_t, uintptr_t>;
    static_assert(sizeof(Integer) == sizeof(Member));
    cls.def_property(
        name, [member](const Struct& s) { return Integer(s.*member); },
        [member](Struct& s, Integer value) { s.*member = Member(value); });
  } else {
    cls.def_readwrite(name, member);
  }
}

template <typename Struct>
py::class_<Struct> bind_struct(py::module_& m, const std::string& name) {
  py::class_<Struct> cls(m, name.c_str());
  cls.def(py::init([](const py::kwargs& fields) {
    Struct s{};
    py::object self = py::cast(&s, py::return_value_policy::reference);
    for (const auto& field : fields) py::setattr(self, field.first, field.second);
    return s;
  }));
  return cls;
}

#define FIELD(member) bind_field(cls, #member, &T::member)

// Structs that point at elements of E, named with `suffix`.
template <typename E>
void bind_element_params(py::module_& m, const std::string& suffix) {
  {
    using T = PagedKvOf<E>;
    auto cls = bind_struct<T>(m, "PagedKv" + suffix);
    FIELD(k_pages); FIELD(v_pages); FIELD(page_table); FIELD(max_pages); FIELD(num_heads_kv); FIELD(head_dim);
  }
  {
    using T = RowLinearParamsOf<E>;
    auto cls = bind_struct<T>(m, "RowLinearParams" + suffix);
    FIELD(x); FIELD(weight); FIELD(weight_diff); FIELD(weight_coded); FIELD(weight_diff_coded); FIELD(residual);
    FIELD(out); FIELD(partial_value); FIELD(partial_id); FIELD(workspace); FIELD(workspace_bytes);
    FIELD(num_rows); FIELD(num_rows_ar); FIELD(in_features); FIELD(out_features); FIELD(num_partials); FIELD(epilogue);
    FIELD(next_weight); FIELD(next_in_features); FIELD(next_out_features);
  }
  {
    using T = QkvCommitParamsOf<E>;
    auto cls = bind_struct<T>(m, "QkvCommitParams" + suffix);
    FIELD(qkv); FIELD(cos_sin); FIELD(q_norm); FIELD(k_norm); FIELD(q_norm_diff); FIELD(k_norm_diff);
    FIELD(q_out); FIELD(scratch_k); FIELD(scratch_v); FIELD(rows); FIELD(kv); FIELD(num_heads_q); FIELD(eps);
  }
  {
    using T = DualAttnParamsOf<E>;
    auto cls = bind_struct<T>(m, "DualAttnParams" + suffix);
    FIELD(q); FIELD(scratch_k); FIELD(scratch_v); FIELD(out); FIELD(workspace); FIELD(workspace_bytes);
    FIELD(rows); FIELD(kv); FIELD(num_heads_q); FIELD(max_seq_len); FIELD(softmax_scale);
  }
  {
    using T = RmsNormParamsOf<E>;
    auto cls = bind_struct<T>(m, "RmsNormParams" + suffix);
    FIELD(x); FIELD(weight); FIELD(row_index); FIELD(out); FIELD(num_rows); FIELD(hidden); FIELD(eps);
  }
  {
    using T = EmbedParamsOf<E>;
    auto cls = bind_struct<T>(m, "EmbedParams" + suffix);
    FIELD(token); FIELD(table); FIELD(out); FIELD(num_rows); FIELD(hidden); FIELD(vocab_size);
  }
}

void bind_params(py::module_& m) {
  {
    using T = Rows;
    auto cls = bind_struct<T>(m, "Rows");
    FIELD(token); FIELD(position); FIELD(seq); FIELD(prefix_len); FIELD(group_start); FIELD(num_rows);
    FIELD(num_rows_ar); FIELD(num_groups); FIELD(num_groups_ar); FIELD(max_group_rows);
  }
  bind_element_params<bf16_t>(m, "");
  bind_element_params<float>(m, "F32");
  {
    using T = SlotEdits;
    auto cls = bind_struct<T>(m, "SlotEdits");
    FIELD(penalties); FIELD(token_counts); FIELD(bias_ids); FIELD(bias_values); FIELD(stop_ids);
    FIELD(min_position); FIELD(max_bias); FIELD(max_stop_ids);
  }
  {
    using T = ProcessLogitsParams;
    auto cls = bind_struct<T>(m, "ProcessLogitsParams");
    FIELD(logits); FIELD(logit_rows); FIELD(cache_seqlens); FIELD(temperature); FIELD(top_k); FIELD(top_p);
    FIELD(min_p); FIELD(seed); FIELD(partial_value); FIELD(partial_id); FIELD(log_probs); FIELD(edits); FIELD(rows);
    FIELD(num_rows); FIELD(vocab_size); FIELD(purpose);
  }
  {
    using T = CountTokensParams;
    auto cls = bind_struct<T>(m, "CountTokensParams");
    FIELD(token_counts); FIELD(num_counted); FIELD(state); FIELD(vocab_size);
  }
  {
    using T = SlotState;
    auto cls = bind_struct<T>(m, "SlotState");
    FIELD(cache_seqlens); FIELD(block_tokens); FIELD(num_drafts); FIELD(num_verified); FIELD(num_accepted);
    FIELD(limit); FIELD(stop_ids); FIELD(finish); FIELD(output); FIELD(num_output); FIELD(runner_up);
    FIELD(draft_prob); FIELD(hypotheses); FIELD(num_slots); FIELD(max_block_len); FIELD(max_fan_out);
    FIELD(max_stop_ids); FIELD(output_capacity);
  }
  {
    using T = ConsensusParams;
    auto cls = bind_struct<T>(m, "ConsensusParams");
    FIELD(partial_value); FIELD(partial_id); FIELD(state); FIELD(next_token); FIELD(next_position);
    FIELD(next_seq); FIELD(next_prefix_len); FIELD(rows_per_slot); FIELD(block_len); FIELD(fan_out);
    FIELD(num_partials); FIELD(mask_token_id); FIELD(step); FIELD(next_pass);
  }
}

struct Recording {
  py::object tape;
};

// One overload of each op for structs of E.
template <typename E>
void bind_cpu_element_ops(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("row_linear", &cpu::row_linear<E>, release);
  m.def("qkv_commit", &cpu::qkv_commit<E>, release);
  m.def("dual_attn", &cpu::dual_attn<E>, release);
  m.def("rms_norm", &cpu::rms_norm<E>, release);
  m.def("embed", &cpu::embed<E>, release);
}

void bind_cpu(py::module_ m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  bind_cpu_element_ops<bf16_t>(m);
  bind_cpu_element_ops<float>(m);
  m.def("isa", &cpu::isa);
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(name.c_str()); });  // which None is not
  m.def("takes_coded_weights", &cpu::takes_coded_weights);
  py::class_<cpu::WeightEncoder>(m, "WeightEncoder")
      .def(py::init([](uintptr_t plain, int64_t num_strips, int64_t num_steps) {
             return cpu::WeightEncoder(reinterpret_cast<const bf16_t*>(plain), num_strips, num_steps);
           }), release)
      .def_property_readonly("nbytes", &cpu::WeightEncoder::nbytes)
      .def("write", [](const cpu::WeightEncoder& encoder, uintptr_t out) {
        encoder.write(reinterpret_cast<char*>(out));
      }, release);
  m.def("set_num_threads", &cpu::set_num_threads);
  m.def("advise_huge_pages", [](uintptr_t data, int64_t num_bytes) {
    cpu::advise_huge_pages(reinterpret_cast<void*>(data), num_bytes);
  });
  m.def("consensus", &cpu::consensus, release);
  m.def("process_logits", &cpu::process_logits, release);
  m.def("count_tokens", &cpu::count_tokens, release);

  // `with tape.record(): ...` records the cpu ops called on this thread; replay() runs them.
  py::class_<cpu::Tape>(m, "Tape")
      .def(py::init())
      .def("record", [](py::object tape) { return Recording{std::move(tape)}; })
      .def("replay", &cpu::Tape::replay, release)
      .def("__len__", &cpu::Tape::size);
  py::class_<Recording>(m, "Recording")
      .def("__enter__", [](Recording& r) { r.tape.cast<cpu::Tape&>().start(); })
      .def("__exit__", [](Recording& r, const py::args&) { r.tape.cast<cpu::Tape&>().stop(); });
}

#if defined(ORTHRUS_WITH_CUDA)
void check(const char* op, int error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + cuda::error_string(error));
}

template <typename Params>
void bind_launcher(py::module_& m, const char* name, int (*launch)(const Params&, void*)) {
  m.def(name, [name, launch](const Params& p, uintptr_t stream) {
    check(name, launch(p, reinterpret_cast<void*>(stream)));
  });
}

void bind_cuda(py::module_ m) {
  bind_launcher<RowLinearParams>(m, "row_linear", &cuda::row_linear);
  bind_launcher<RowLinearParamsOf<float>>(m, "row_linear", &cuda::row_linear);
  bind_launcher<QkvCommitParams>(m, "qkv_commit", &cuda::qkv_commit);
  bind_launcher<QkvCommitParamsOf<float>>(m, "qkv_commit", &cuda::qkv_commit);
  bind_launcher<DualAttnParams>(m, "dual_attn", &cuda::dual_attn);
  bind_launcher<DualAttnParamsOf<float>>(m, "dual_attn", &cuda::dual_attn);
  bind_launcher<ConsensusParams>(m, "consensus", &cuda::consensus);
  m.def("isa", &cuda::isa);
  m.def("new_stream", [] {
    void* stream = nullptr;
    check("new_stream", cuda::new_stream(&stream));
    return reinterpret_cast<uintptr_t>(stream);
  });
  m.def("row_linear_workspace", &cuda::row_linear_workspace);
  m.def("row_linear_num_partials", &cuda::row_linear_num_partials);
  m.def("dual_attn_workspace", &cuda::dual_attn_workspace);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  bind_params(m);
  bind_cpu(m.def_submodule("cpu"));
#if defined(ORTHRUS_WITH_CUDA)
  bind_cuda(m.def_submodule("cuda"));
#endif
  m.attr("PAGE_SIZE") = kPageSize;
  m.def("build_info", [] {
    py::dict info;
#if defined(ORTHRUS_WITH_CUDA)
    info["cuda_archs"] = ORTHRUS_CUDA_ARCHS;
    info["cuda_version"] = ORTHRUS_CUDA_VERSION;
#else
    info["cuda_archs"] = "";
    info["cuda_version"] = "";
#endif
    info["compiler"] = ORTHRUS_CXX_COMPILER;
    info["cpu_isa"] = cpu::isa();
    return info;
  });
}
