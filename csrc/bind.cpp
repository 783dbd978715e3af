// What Python reads from the binary (the table's text, the SIMD level in use, how it was built), and what it leaves to
// C++ for speed. No torch headers here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "gates.h"

namespace torchbp {
const char* cpu_level();
void empty_cache();
}  // namespace torchbp

namespace {

namespace py = pybind11;

using Row = std::map<std::string, std::string>;

// The rows of gates.h, column name -> text as it was compiled.
std::vector<Row> rows() {
  return {
#define ROW(name, parameter, forward, saves, backward, second)                                \
  Row{{"name", #name},       {"inputs", "x"},   {"parameter", #parameter}, {"saves", #saves}, \
      {"forward", #forward}, {"dx", #backward}, {"dxx", #second}},
      TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, forward, saves, backward_a, backward_b, second_aa, second_ab, second_bb)                         \
  Row{{"name", #name},     {"inputs", "a, b"},  {"parameter", "none"}, {"saves", #saves},   {"forward", #forward}, \
      {"da", #backward_a}, {"db", #backward_b}, {"daa", #second_aa},   {"dab", #second_ab}, {"dbb", #second_bb}},
          TORCHBP_BINARY_GATES(ROW)
#undef ROW
  };
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

// The value of this very key, or null: looked for from `at` on, where the last was found, as conditions are in the order
// of a dict or nearly. The hash of a tensor, which a dict asks for, is a function in Python.
PyObject* value_of(PyObject* dict, PyObject* key, Py_ssize_t& at) {
  PyObject *here = nullptr, *value = nullptr;
  for (int turn = 0; turn < 2; ++turn, at = 0)
    while (PyDict_Next(dict, &at, &here, &value))
      if (here == key) return value;
  return nullptr;
}

// Whether things are as they were: of each (container, key, value), container[key] is still that very value. The
// container is a dict, a list, or any object whose attribute the key names, or its class's descriptor of that, which
// takes less to look up; with None for a key the value is the length of a dict or list. A training step asks this of a
// whole model and its optimizer, so that it has to take nanoseconds: no function of pybind11, which takes 30 itself.
PyObject* unchanged(PyObject*, PyObject* conditions) {
  if (!PyTuple_CheckExact(conditions)) return PyErr_Format(PyExc_TypeError, "unchanged: conditions wants a tuple");
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(conditions); ++i) {
    PyObject* const condition = PyTuple_GET_ITEM(conditions, i);
    PyObject* const container = PyTuple_GET_ITEM(condition, 0);
    PyObject* const key = PyTuple_GET_ITEM(condition, 1);
    PyObject* const value = PyTuple_GET_ITEM(condition, 2);
    PyObject* found = nullptr;  // borrowed
    if (key == Py_None) {
      const Py_ssize_t size = PyDict_Check(container) ? PyDict_GET_SIZE(container) : PyList_GET_SIZE(container);
      if (size != PyLong_AsSsize_t(value)) Py_RETURN_FALSE;
      continue;
    }
    if (PyDict_Check(container) && !PyUnicode_CheckExact(key)) {
      found = value_of(container, key, at);
    } else if (PyDict_Check(container)) {
      found = PyDict_GetItemWithError(container, key);
      if (!found && PyErr_Occurred()) return nullptr;
    } else if (PyList_Check(container)) {
      const Py_ssize_t place = PyLong_AsSsize_t(key);
      found = place < PyList_GET_SIZE(container) ? PyList_GET_ITEM(container, place) : nullptr;
    } else {
      const descrgetfunc get = Py_TYPE(key)->tp_descr_get;
      PyObject* const attribute =
          get ? get(key, container, reinterpret_cast<PyObject*>(Py_TYPE(container))) : PyObject_GetAttr(container, key);
      if (!attribute) return nullptr;
      Py_DECREF(attribute);  // another one holds it, if it is the value
      found = attribute;
    }
    if (found != value) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef unchanged_method = {"unchanged", unchanged, METH_O,
                                "Whether container[key] is value for each (container, key, value)."};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "torchbp's binary: importing it registers torch.ops.torchbp.";
  m.def("rows", &rows, "The table of gates: one dict a row, column name -> text as it was compiled.");
  m.def("cpu_level", &torchbp::cpu_level, "The SIMD level in use: baseline, avx2 or avx512.");
  m.attr("unchanged") = py::reinterpret_steal<py::object>(PyCFunction_New(&unchanged_method, nullptr));
  m.def("empty_cache", &torchbp::empty_cache, "Give the memory that is kept for results back to the system.");
  m.def("compiler", &compiler, "The C++ compiler that built the extension.");
}
