// What Python reads from the binary: the table's text, the SIMD level in use, how it was built. No torch headers here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "gates.h"

namespace torchbp {
const char* cpu_level();
}

namespace {

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "torchbp's binary: importing it registers torch.ops.torchbp.";
  m.def("rows", &rows, "The table of gates: one dict a row, column name -> text as it was compiled.");
  m.def("cpu_level", &torchbp::cpu_level, "The SIMD level in use: baseline, avx2 or avx512.");
  m.def("compiler", &compiler, "The C++ compiler that built the extension.");
}
