// Python face of the native module: the parameter structs as classes with keyword constructors,
// one launcher per op and backend, and build_info(). Shapes are validated in orthrus_rt/ops.py and checks.py.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/encode_weight.h"
#include "cpu/tape.h"
#include "orthrus/ops.h"
#include "struct_class.h"

namespace py = pybind11;
using namespace orthrus;

namespace {

template <typename T>
void bind_struct(py::module_& m, const std::string& name, std::vector<Field> fields) {
  if (!class_of<T>().define(m.ptr(), name, sizeof(T), std::move(fields))) throw py::error_already_set();
}

#define FIELD(member) make_field<decltype(T::member)>(#member, offsetof(T, member))

// Structs that point at elements of type E, named with `suffix`.
template <typename E>
void bind_element_params(py::module_& m, const std::string& suffix) {
  {
    using T = PagedKvOf<E>;
    bind_struct<T>(m, "PagedKv" + suffix, {
      FIELD(k_pages), FIELD(v_pages), FIELD(page_table), FIELD(max_pages), FIELD(num_heads_kv), FIELD(head_dim)});
  }
  {
    using T = RowLinearParamsOf<E>;
    bind_struct<T>(m, "RowLinearParams" + suffix, {
      FIELD(x), FIELD(weight), FIELD(weight_diff), FIELD(weight_bits), FIELD(weight_diff_bits), FIELD(leading_only),
      FIELD(residual), FIELD(out), FIELD(partial_value), FIELD(partial_id), FIELD(workspace), FIELD(workspace_bytes),
      FIELD(num_rows), FIELD(num_rows_ar), FIELD(in_features), FIELD(out_features), FIELD(num_partials),
      FIELD(epilogue), FIELD(next_weight), FIELD(next_in_features), FIELD(next_out_features),
      FIELD(next_weight_bits)});
  }
  {
    using T = QkvCommitParamsOf<E>;
    bind_struct<T>(m, "QkvCommitParams" + suffix, {
      FIELD(qkv), FIELD(cos_sin), FIELD(q_norm), FIELD(k_norm), FIELD(q_norm_diff), FIELD(k_norm_diff), FIELD(q_out),
      FIELD(scratch_k), FIELD(scratch_v), FIELD(rows), FIELD(kv), FIELD(num_heads_q), FIELD(eps)});
  }
  {
    using T = DualAttnParamsOf<E>;
    bind_struct<T>(m, "DualAttnParams" + suffix, {
      FIELD(q), FIELD(scratch_k), FIELD(scratch_v), FIELD(out), FIELD(workspace), FIELD(workspace_bytes), FIELD(rows),
      FIELD(kv), FIELD(num_heads_q), FIELD(max_seq_len), FIELD(softmax_scale)});
  }
  {
    using T = RmsNormParamsOf<E>;
    bind_struct<T>(m, "RmsNormParams" + suffix, {
      FIELD(x), FIELD(weight), FIELD(row_index), FIELD(out), FIELD(num_rows), FIELD(hidden), FIELD(eps)});
  }
  {
    using T = EmbedParamsOf<E>;
    bind_struct<T>(m, "EmbedParams" + suffix, {
      FIELD(token), FIELD(table), FIELD(out), FIELD(num_rows), FIELD(hidden), FIELD(vocab_size)});
  }
}

void bind_params(py::module_& m) {
  {
    using T = Rows;
    bind_struct<T>(m, "Rows", {
      FIELD(token), FIELD(position), FIELD(seq), FIELD(prefix_len), FIELD(group_start), FIELD(num_rows),
      FIELD(num_rows_ar), FIELD(num_groups), FIELD(num_groups_ar), FIELD(max_group_rows), FIELD(blocks_per_seq)});
  }
  bind_element_params<bf16_t>(m, "");
  bind_element_params<float>(m, "F32");
  {
    using T = SlotEdits;
    bind_struct<T>(m, "SlotEdits", {
      FIELD(penalties), FIELD(token_counts), FIELD(bias_ids), FIELD(bias_values), FIELD(stop_ids),
      FIELD(min_position), FIELD(max_bias), FIELD(max_stop_ids)});
  }
  {
    using T = ProcessLogitsParams;
    bind_struct<T>(m, "ProcessLogitsParams", {
      FIELD(logits), FIELD(logit_rows), FIELD(cache_seqlens), FIELD(temperature), FIELD(top_k), FIELD(top_p),
      FIELD(min_p), FIELD(seed), FIELD(partial_value), FIELD(partial_id), FIELD(log_probs), FIELD(edits), FIELD(rows),
      FIELD(num_rows), FIELD(vocab_size), FIELD(purpose)});
  }
  {
    using T = CountTokensParams;
    bind_struct<T>(m, "CountTokensParams", {
      FIELD(token_counts), FIELD(num_counted), FIELD(state), FIELD(vocab_size)});
  }
  {
    using T = SlotState;
    bind_struct<T>(m, "SlotState", {
      FIELD(cache_seqlens), FIELD(block_tokens), FIELD(num_drafts), FIELD(num_verified), FIELD(num_accepted),
      FIELD(limit), FIELD(stop_ids), FIELD(finish), FIELD(output), FIELD(num_output), FIELD(runner_up),
      FIELD(draft_prob), FIELD(hypotheses), FIELD(num_slots), FIELD(max_block_len), FIELD(max_fan_out),
      FIELD(max_stop_ids), FIELD(output_capacity)});
  }
  {
    using T = ConsensusParams;
    bind_struct<T>(m, "ConsensusParams", {
      FIELD(partial_value), FIELD(partial_id), FIELD(state), FIELD(next_token), FIELD(next_position), FIELD(next_seq),
      FIELD(next_prefix_len), FIELD(rows_per_slot), FIELD(block_len), FIELD(fan_out), FIELD(num_partials),
      FIELD(mask_token_id), FIELD(step), FIELD(next_pass)});
  }
}

#undef FIELD

// An op for the parameters of one class, called like CUDA's; the CPU's ignore the stream and do not fail.
struct Launcher {
  const StructClass* params_class;
  int (*launch)(const void* params, void* stream);
};

template <typename Params, void (*kOp)(const Params&)>
Launcher on_cpu() {
  return {&class_of<Params>(), [](const void* params, void*) {
            kOp(*static_cast<const Params*>(params));
            return 0;
          }};
}

// The launcher of `op` for the class of `params`.
const Launcher& choose(const char* op, const std::vector<Launcher>& launchers, py::handle params) {
  for (const Launcher& launcher : launchers) {
    if (launcher.params_class->data_of(params.ptr())) return launcher;
  }
  std::string names;
  for (const Launcher& launcher : launchers) names += (names.empty() ? "" : " or ") + launcher.params_class->name();
  throw py::type_error(std::string(op) + ": params must be " + names + ", got " + Py_TYPE(params.ptr())->tp_name);
}

void bind_cpu_op(py::module_& m, const char* op, std::vector<Launcher> launchers) {
  m.def(op, [op, launchers = std::move(launchers)](py::handle object) {
    const Launcher& launcher = choose(op, launchers, object);
    const void* params = launcher.params_class->data_of(object.ptr());
    const py::gil_scoped_release release;
    launcher.launch(params, nullptr);
  });
}

void bind_cpu(py::module_ m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  bind_cpu_op(m, "row_linear", {on_cpu<RowLinearParamsOf<bf16_t>, cpu::row_linear>(),
                                on_cpu<RowLinearParamsOf<float>, cpu::row_linear>()});
  bind_cpu_op(m, "qkv_commit", {on_cpu<QkvCommitParamsOf<bf16_t>, cpu::qkv_commit>(),
                                on_cpu<QkvCommitParamsOf<float>, cpu::qkv_commit>()});
  bind_cpu_op(m, "dual_attn", {on_cpu<DualAttnParamsOf<bf16_t>, cpu::dual_attn>(),
                               on_cpu<DualAttnParamsOf<float>, cpu::dual_attn>()});
  bind_cpu_op(m, "rms_norm", {on_cpu<RmsNormParamsOf<bf16_t>, cpu::rms_norm>(),
                              on_cpu<RmsNormParamsOf<float>, cpu::rms_norm>()});
  bind_cpu_op(m, "embed", {on_cpu<EmbedParamsOf<bf16_t>, cpu::embed>(),
                           on_cpu<EmbedParamsOf<float>, cpu::embed>()});
  bind_cpu_op(m, "consensus", {on_cpu<ConsensusParams, cpu::consensus>()});
  bind_cpu_op(m, "process_logits", {on_cpu<ProcessLogitsParams, cpu::process_logits>()});
  bind_cpu_op(m, "count_tokens", {on_cpu<CountTokensParams, cpu::count_tokens>()});
  m.def("isa", &cpu::isa);
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(name.c_str()); });  // a string, which None is not
  m.def("takes_coded_weights", &cpu::takes_coded_weights);
  py::class_<cpu::WeightEncoder>(m, "WeightEncoder")
      .def(py::init([](uintptr_t plain, int64_t num_strips, int64_t num_steps, int bits) {
             return cpu::WeightEncoder(reinterpret_cast<const bf16_t*>(plain), num_strips, num_steps, bits);
           }), release)
      .def_property_readonly("nbytes", &cpu::WeightEncoder::nbytes)
      .def("write", [](const cpu::WeightEncoder& encoder, uintptr_t out) {
        encoder.write(reinterpret_cast<char*>(out));
      }, release);
  m.def("set_num_threads", &cpu::set_num_threads);
  m.def("advise_huge_pages", [](uintptr_t data, int64_t num_bytes) {
    cpu::advise_huge_pages(reinterpret_cast<void*>(data), num_bytes);
  });

  // `with tape: ...` records the cpu ops called on this thread; replay() runs them.
  py::class_<cpu::Tape>(m, "Tape")
      .def(py::init())
      .def("__enter__", &cpu::Tape::start)
      .def("__exit__", [](cpu::Tape& tape, const py::args&) { tape.stop(); })
      .def("stop", &cpu::Tape::stop)
      .def("replay", &cpu::Tape::replay, release)
      .def("__len__", &cpu::Tape::size);
}

#if defined(ORTHRUS_WITH_CUDA)
void check(const char* op, int error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + cuda::error_string(error));
}

template <typename Params, int (*kOp)(const Params&, void*)>
Launcher on_cuda() {
  return {&class_of<Params>(), [](const void* params, void* stream) {
            return kOp(*static_cast<const Params*>(params), stream);
          }};
}

void bind_cuda_op(py::module_& m, const char* op, std::vector<Launcher> launchers) {
  m.def(op, [op, launchers = std::move(launchers)](py::handle params, uintptr_t stream) {
    const Launcher& launcher = choose(op, launchers, params);
    const void* data = launcher.params_class->data_of(params.ptr());
    cuda::read_environment();              // while no Python thread can change it
    const py::gil_scoped_release release;  // a launch blocks while the queue is full
    check(op, launcher.launch(data, reinterpret_cast<void*>(stream)));
  });
}

void bind_cuda(py::module_ m) {
  bind_cuda_op(m, "row_linear", {on_cuda<RowLinearParamsOf<bf16_t>, cuda::row_linear>(),
                                 on_cuda<RowLinearParamsOf<float>, cuda::row_linear>()});
  bind_cuda_op(m, "qkv_commit", {on_cuda<QkvCommitParamsOf<bf16_t>, cuda::qkv_commit>(),
                                 on_cuda<QkvCommitParamsOf<float>, cuda::qkv_commit>()});
  bind_cuda_op(m, "dual_attn", {on_cuda<DualAttnParamsOf<bf16_t>, cuda::dual_attn>(),
                                on_cuda<DualAttnParamsOf<float>, cuda::dual_attn>()});
  bind_cuda_op(m, "consensus", {on_cuda<ConsensusParams, cuda::consensus>()});
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
