// torch.ops.bnext_simt: the CUDA kernels and launchers of bnext, run by the executor on CPU
// tensors, under the schemas of torch.ops.bnext; and the executor's settings for the tests.
#include <ATen/core/dispatch/Dispatcher.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <vector>

#include "../../csrc/ops/ops.h"
#include "executor.h"

namespace {

c10::FunctionSchema schema_of(const char* op) {
  const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow((std::string("bnext::") + op).c_str(), "");
  return handle.schema().cloneWithName(std::string("bnext_simt::") + op, "");
}

}  // namespace

TORCH_LIBRARY(bnext_simt, m) {
  for (const char* op : bnext::kOps) {
    m.def(schema_of(op));
  }

  // The executor's settings and counters. As ops, not by pybind11: this module's TLS segment is the
  // kernels' shared memory, and pybind11 keeps variables of its own there.
  m.def("set_seed(int seed) -> ()", [](std::int64_t seed) { simt::set_seed(seed); });
  m.def("reset_counters() -> ()", &simt::reset_counters);
  // launches, bytes loaded and stored, accesses of 16 bytes and smaller ones
  m.def("counters() -> int[]", [] {
    const simt::Counters c = simt::counters();
    return std::vector<std::int64_t>{
        static_cast<std::int64_t>(c.launches), static_cast<std::int64_t>(c.bytes_loaded),
        static_cast<std::int64_t>(c.bytes_stored),
        static_cast<std::int64_t>(c.loads_16 + c.stores_16),
        static_cast<std::int64_t>(c.loads_smaller + c.stores_smaller)};
  });
  m.def(
      "cuda_plan(Tensor input, int? ghost_batch_size=None, int tensors=1) -> str",
      &bnext::cuda_plan);
  m.def(
      "limit_cuda_device(int num_sms, int shared_per_sm, int shared_per_block, "
      "int narrow_elements) -> ()",
      &bnext::limit_cuda_device);
  // As while a stream is being captured into a graph; the launches run at once all the same.
  m.def("fail_next_launch() -> ()", &simt::fail_next_launch);
  m.def("last_error() -> int", [] { return static_cast<std::int64_t>(cudaPeekAtLastError()); });
  m.def("set_capturing(bool capturing) -> ()", &simt::set_capturing);
}

TORCH_LIBRARY_IMPL(bnext_simt, CPU, m) {
  bnext::implement<bnext::cuda_backend>(m);
}
