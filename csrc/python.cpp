// bnext._C for Python: batch_norm and batch_norm_backward called below autograd with plain
// arguments unpacked one by one. torch.ops would build a boxed stack by the schema, look for
// overrides and unbox it again, which is an eighth of a small layer's step
// (docs/performance.md, "Call overhead").
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops/calls.h"

namespace bnext {
namespace {

// Argument<T>: which Python objects are plain values of T, and the value of one.
template <typename T>
struct Argument;

template <>
struct Argument<at::Tensor> {  // a tensor of no subclass, or a parameter
  static bool is_plain(PyObject* object) { return THPVariable_CheckExact(object); }
  static const at::Tensor& get(PyObject* object) { return THPVariable_Unpack(object); }
};

template <>
struct Argument<bool> {
  static bool is_plain(PyObject* object) { return PyBool_Check(object); }
  static bool get(PyObject* object) { return object == Py_True; }
};

template <>
struct Argument<double> {
  static bool is_plain(PyObject* object) { return PyFloat_CheckExact(object); }
  static double get(PyObject* object) { return PyFloat_AS_DOUBLE(object); }
};

template <>
struct Argument<c10::SymInt> {
  static bool is_plain(PyObject* object) {
    int overflow = 0;
    return PyLong_CheckExact(object) &&
           (PyLong_AsLongLongAndOverflow(object, &overflow), overflow == 0);
  }
  static c10::SymInt get(PyObject* object) { return PyLong_AsLongLong(object); }
};

template <>
struct Argument<std::string_view> {
  static bool is_plain(PyObject* object) {
    return PyUnicode_CheckExact(object) && PyUnicode_IS_COMPACT_ASCII(object);
  }
  static std::string_view get(PyObject* object) {
    return {
        static_cast<const char*>(PyUnicode_DATA(object)),
        static_cast<std::size_t>(PyUnicode_GET_LENGTH(object))};
  }
};

template <>
struct Argument<std::array<bool, 2>> {
  static bool is_plain(PyObject* object) {
    return PyList_CheckExact(object) && PyList_GET_SIZE(object) == 2 &&
           PyBool_Check(PyList_GET_ITEM(object, 0)) && PyBool_Check(PyList_GET_ITEM(object, 1));
  }
  static std::array<bool, 2> get(PyObject* object) {
    return {PyList_GET_ITEM(object, 0) == Py_True, PyList_GET_ITEM(object, 1) == Py_True};
  }
};

template <typename T>
struct Argument<std::optional<T>> {
  static bool is_plain(PyObject* object) {
    return object == Py_None || Argument<T>::is_plain(object);
  }
  static std::optional<T> get(PyObject* object) {
    return object == Py_None ? std::nullopt : std::optional<T>(Argument<T>::get(object));
  }
};

PyObject* to_tuple(const Tensor4& tensors) {
  PyObject* tuple = PyTuple_New(4);
  if (tuple != nullptr) {
    PyTuple_SET_ITEM(tuple, 0, THPVariable_Wrap(std::get<0>(tensors)));
    PyTuple_SET_ITEM(tuple, 1, THPVariable_Wrap(std::get<1>(tensors)));
    PyTuple_SET_ITEM(tuple, 2, THPVariable_Wrap(std::get<2>(tensors)));
    PyTuple_SET_ITEM(tuple, 3, THPVariable_Wrap(std::get<3>(tensors)));
  }
  return tuple;
}

template <typename Op>
struct BelowAutograd;

template <typename... Args>
struct BelowAutograd<Tensor4(Args...)> {
  using Handle = c10::TypedOperatorHandle<Tensor4(Args...)>;

  // Lives as long as the process, as an op does.
  struct Bound {
    Handle op;
    PyObject* overload;
  };

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t size) {
    HANDLE_TH_ERRORS
    const auto* bound = static_cast<const Bound*>(PyCapsule_GetPointer(self, nullptr));
    const at::AutoDispatchBelowAutograd guard;
    if (size != sizeof...(Args) || at::impl::torch_function_mode_enabled() ||
        at::tracer::impl::is_dispatch_enabled() ||
        !are_plain(args, std::index_sequence_for<Args...>())) {
      return PyObject_Vectorcall(bound->overload, args, size, nullptr);
    }
    return to_tuple(call_plain(bound->op, args, std::index_sequence_for<Args...>()));
    END_HANDLE_TH_ERRORS
  }

 private:
  template <std::size_t... I>
  static bool are_plain(PyObject* const* args, std::index_sequence<I...>) {
    return (Argument<std::decay_t<Args>>::is_plain(args[I]) && ...);
  }

  template <std::size_t... I>
  static Tensor4 call_plain(const Handle& op, PyObject* const* args, std::index_sequence<I...>) {
    // Values, but references to the tensors of the Python objects, which the caller holds.
    const std::tuple<decltype(Argument<std::decay_t<Args>>::get(args[I]))...> values(
        Argument<std::decay_t<Args>>::get(args[I])...);
    const pybind11::gil_scoped_release release;
    return op.call(std::get<I>(values)...);
  }
};

// below_autograd(overload) -> a function of the overload's positional arguments.
template <typename Op>
PyObject* below_autograd(PyObject* /*module*/, PyObject* overload) {
  HANDLE_TH_ERRORS
  using Below = BelowAutograd<Op>;
  using Bound = typename Below::Bound;
  static PyMethodDef method = {
      "below_autograd", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&Below::call)),
      METH_FASTCALL, nullptr};
  const auto name = pybind11::handle(overload).attr("name")().cast<std::string>();
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").template typed<Op>();
  Py_INCREF(overload);
  const auto capsule = pybind11::reinterpret_steal<pybind11::object>(
      PyCapsule_New(new Bound{op, overload}, nullptr, nullptr));
  return PyCFunction_New(&method, capsule.ptr());
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace bnext

// `import bnext._C` also runs the registrations of library.cpp.
PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"batch_norm_below_autograd", &bnext::below_autograd<bnext::ForwardCall::Op>, METH_O,
       nullptr},
      {"batch_norm_backward_below_autograd", &bnext::below_autograd<bnext::BackwardCall::Op>,
       METH_O, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
