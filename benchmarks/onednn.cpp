// oneDNN's fused BatchNorm + ReLU, forward and backward, bound for benchmarks/onednn.py: primitives
// are made once, bound to memory, and called in a loop, so that Python costs a call and no more.

#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <oneapi/dnnl/dnnl.hpp>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Desc = dnnl::memory::desc;
using Pointers = std::map<std::string, std::uintptr_t>;

const std::map<std::string, int> kArguments = {
    {"src", DNNL_ARG_SRC},
    {"dst", DNNL_ARG_DST},
    {"scale", DNNL_ARG_SCALE},
    {"shift", DNNL_ARG_SHIFT},
    {"mean", DNNL_ARG_MEAN},
    {"variance", DNNL_ARG_VARIANCE},
    {"workspace", DNNL_ARG_WORKSPACE},
    {"diff_src", DNNL_ARG_DIFF_SRC},
    {"diff_dst", DNNL_ARG_DIFF_DST},
    {"diff_scale", DNNL_ARG_DIFF_SCALE},
    {"diff_shift", DNNL_ARG_DIFF_SHIFT},
};

dnnl::engine& cpu() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// A primitive and the memory it works on.
class Call {
 public:
  Call(const dnnl::primitive_desc_base& desc, dnnl::primitive primitive, const Pointers& pointers)
      : primitive_(std::move(primitive)), stream_(cpu()) {
    for (const auto& [name, pointer] : pointers) {
      const int id = kArguments.at(name);
      const Desc memory = desc.query_md(dnnl::query::exec_arg_md, id);
      if (memory.get_size() == 0) {
        throw std::invalid_argument("the primitive takes no " + name);
      }
      arguments_.emplace(id, dnnl::memory(memory, cpu(), reinterpret_cast<void*>(pointer)));
    }
  }

  void operator()(int times) {
    for (int i = 0; i < times; ++i) {
      primitive_.execute(stream_, arguments_);
    }
    stream_.wait();
  }

 private:
  dnnl::primitive primitive_;
  dnnl::stream stream_;
  std::unordered_map<int, dnnl::memory> arguments_;
};

// Scale, shift, mean and variance are float32 and [C]; the layout is that of the strides.
class BatchNormRelu {
 public:
  BatchNormRelu(
      const std::vector<std::int64_t>& shape,
      const std::vector<std::int64_t>& strides,
      bool bfloat16,
      bool training,
      float eps) {
    using dnnl::normalization_flags;
    using dnnl::prop_kind;
    using Type = dnnl::memory::data_type;
    const Desc data(shape, bfloat16 ? Type::bf16 : Type::f32, strides);
    auto flags = normalization_flags::use_scale | normalization_flags::use_shift |
                 normalization_flags::fuse_norm_relu;
    if (!training) {
      flags = flags | normalization_flags::use_global_stats;
    }
    const auto kind = training ? prop_kind::forward_training : prop_kind::forward_inference;
    forward_ = {cpu(), kind, data, data, eps, flags};
    forward_primitive_ = dnnl::batch_normalization_forward(forward_);
    if (training) {
      backward_ = {cpu(), prop_kind::backward, data, data, data, eps, flags, forward_};
      backward_primitive_ = dnnl::batch_normalization_backward(backward_);
    }
  }

  Call forward(const Pointers& pointers) const { return {forward_, forward_primitive_, pointers}; }
  Call backward(const Pointers& pointers) const {
    return {backward_, backward_primitive_, pointers};
  }
  std::size_t workspace_bytes() const { return forward_.workspace_desc().get_size(); }
  std::vector<std::string> implementations() const {
    std::vector<std::string> names = {forward_.impl_info_str()};
    if (backward_) {
      names.emplace_back(backward_.impl_info_str());
    }
    return names;
  }

 private:
  dnnl::batch_normalization_forward::primitive_desc forward_;
  dnnl::batch_normalization_backward::primitive_desc backward_;
  dnnl::batch_normalization_forward forward_primitive_;
  dnnl::batch_normalization_backward backward_primitive_;
};

std::string version() {
  const dnnl_version_t* v = dnnl_version();
  return std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
}

}  // namespace

PYBIND11_MODULE(bnext_onednn, module) {
  py::class_<Call>(module, "Call").def("__call__", &Call::operator(), py::arg("times") = 1);
  py::class_<BatchNormRelu>(module, "BatchNormRelu")
      .def(
          py::init<
              const std::vector<std::int64_t>&, const std::vector<std::int64_t>&, bool, bool,
              float>(),
          py::arg("shape"), py::arg("strides"), py::kw_only(), py::arg("bfloat16"),
          py::arg("training"), py::arg("eps"))
      .def("forward", &BatchNormRelu::forward)
      .def("backward", &BatchNormRelu::backward)
      .def_property_readonly("workspace_bytes", &BatchNormRelu::workspace_bytes)
      .def_property_readonly("implementations", &BatchNormRelu::implementations);
  module.def("version", &version);
  module.def("threads", &omp_get_max_threads, "How many threads OpenMP, thus oneDNN, will use.");
}
