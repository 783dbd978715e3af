// The table of gates: every elementwise operation of torchbp is one row, written once.
//
// The text of a row is compiled to the CPU kernels (once per SIMD level) and to the CUDA kernels, evaluated in
// Python as the reference, proved by SymPy (gradient = derivative of forward, second order = derivative of the
// gradient) and printed in the documentation. So a column may use only what C++ and Python spell alike: arithmetic,
// comparisons, |, whole numbers, and the words of math.h (where, abs, exp, expm1, tanh, isnan).
//
//   x, a, b   inputs            y    output            dy   upstream gradient dL/dy
//   parameter a Python number named in the row's columns, or none
//   saves     what forward keeps for backward: its input x, its output y, its two inputs, or nothing
//
// NaN must propagate, so a row says where(x < 0, 0, x) and not max(0, x); comparisons stand as PyTorch has them, so
// that NaN and ties take the same branch. Of two spellings the one that rounds better: sigmoid is e - e q below 0 and
// 1 - q above, with e = exp(-|x|) and q = e / (1 + e), which rounds y once where e / (1 + e) rounds it twice; and
// (1 - y) (1 + y) keeps the digits that 1 - y^2 loses near y = 1. To add a gate see CONTRIBUTING.md.
#pragma once

// clang-format off

//      name        parameter       y = f(x)                                  saves    dx = dy * f'(x)                                second order: d(dx)/d(saved)
#define TORCHBP_UNARY_GATES(ROW) \
    ROW(exp,        none,           exp(x),                                   y,       dy * y,                                        dy) \
    ROW(reciprocal, none,           1 / x,                                    y,       -dy * (y * y),                                 -2 * dy * y) \
    ROW(scale,      a,              a * x,                                    nothing, a * dy,                                        0) \
    ROW(shift,      c,              x + c,                                    nothing, dy,                                            0) \
    ROW(relu,       none,           where(x < 0, 0, x),                       y,       where(y <= 0, 0, dy),                          0) \
    ROW(leaky_relu, negative_slope, where(x > 0, x, negative_slope * x),      x,       where(x > 0, dy, negative_slope * dy),         0) \
    ROW(elu,        alpha,          where(x < 0, alpha * expm1(x), x),        x,       where(x > 0, dy, dy * alpha * exp(x)),         where(x >= 0, 0, dy * alpha * exp(x))) \
    ROW(sigmoid,    none,           where(x < 0, exp(-abs(x)) - exp(-abs(x)) * (exp(-abs(x)) / (1 + exp(-abs(x)))), 1 - exp(-abs(x)) / (1 + exp(-abs(x)))), y, dy * ((1 - y) * y), dy * (1 - 2 * y)) \
    ROW(tanh,       none,           tanh(x),                                  y,       dy * ((1 - y) * (1 + y)),                      -2 * dy * y)

//      name        y = f(a, b)                            saves    da = dy * df/da                              db = dy * df/db                              second order: d(da)/da, d(da)/db = d(db)/da, d(db)/db
#define TORCHBP_BINARY_GATES(ROW) \
    ROW(add,        a + b,                                 nothing, dy,                                          dy,                                          0,  0,   0) \
    ROW(multiply,   a * b,                                 inputs,  dy * b,                                      dy * a,                                      0,  dy,  0) \
    ROW(maximum,    where((a > b) | isnan(a), a, b),       inputs,  where(a < b, 0, where(a == b, dy / 2, dy)),  where(b < a, 0, where(a == b, dy / 2, dy)),  0,  0,   0)

// clang-format on
