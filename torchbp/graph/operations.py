"""What is known of PyTorch's operations by name: which are elementwise, the pattern that a gate
makes of gradients, and the rule of its gradient in words."""

from __future__ import annotations

__all__ = ["ELEMENTWISE", "VIEWS", "canonical", "pattern_of", "rule_of"]

#: The same operation by other names.
ALIASES = {
    "multiply": "mul", "rmul": "mul", "imul": "mul", "subtract": "sub", "isub": "sub",
    "radd": "add", "iadd": "add", "true_divide": "div", "divide": "div", "truediv": "div",
    "rtruediv": "rdiv", "itruediv": "div", "negative": "neg", "absolute": "abs", "clip": "clamp",
    "rmatmul": "matmul", "rpow": "pow", "ipow": "pow", "t": "transpose", "T": "transpose",
    "mT": "transpose", "swapaxes": "transpose", "swapdims": "transpose", "movedim": "permute",
    "concat": "cat", "concatenate": "cat", "special_expit": "sigmoid", "fmax": "maximum",
    "fmin": "minimum",
}  # fmt: skip

#: Element i of the result depends on element i of each operand alone, once these are broadcast.
ELEMENTWISE = frozenset(
    """
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh celu clamp clone copysign
    cos cosh deg2rad digamma div elu erf erfc erfinv exp exp2 expm1 float_power gelu hardshrink
    hardsigmoid hardswish hardtanh hypot leaky_relu lerp lgamma log log10 log1p log2
    logaddexp logaddexp2 logit logsigmoid masked_fill maximum minimum mish mul nan_to_num
    neg positive pow rad2deg rdiv reciprocal relu relu6 rsqrt rsub scale selu shift sigmoid
    silu sin sinc sinh softplus softshrink softsign sqrt square sub tan tanh tanhshrink
    threshold where xlogy
    """.split()  # noqa: SIM905 (sixty pairs of quotes less)
)

#: The same numbers in another shape or order.
VIEWS = frozenset(
    """
    atleast_1d atleast_2d contiguous expand expand_as flatten flip movedim narrow permute
    ravel reshape reshape_as roll squeeze transpose unflatten unsqueeze view view_as
    """.split()  # noqa: SIM905 (sixty pairs of quotes less)
)

PATTERNS = {
    "add": "distributor", "sub": "distributor", "rsub": "distributor", "shift": "distributor",
    "sum": "distributor", "mul": "swap multiplier", "maximum": "router", "minimum": "router",
    "max": "router", "min": "router", "amax": "router", "amin": "router", "max_pool1d": "router",
    "max_pool2d": "router", "max_pool3d": "router", "maxout": "router", "relu": "mask",
    "relu6": "mask", "clamp": "mask", "dropout": "mask", "masked_fill": "mask", "where": "mask",
    "threshold": "mask", "scale": "scale", "neg": "scale", "mean": "scale",
    "matmul": "transpose-and-multiply", "mm": "transpose-and-multiply",
    "bmm": "transpose-and-multiply", "mv": "transpose-and-multiply",
    "linear": "transpose-and-multiply", "Linear": "transpose-and-multiply",
    "dot": "swap multiplier",
}  # fmt: skip

#: The gradient of each operand in words, y the result; the last one stands for those that follow.
RULES = {
    "matmul": ("dL/da = dL/dy b^T", "dL/db = a^T dL/dy"),
    "mm": ("dL/da = dL/dy b^T", "dL/db = a^T dL/dy"),
    "bmm": ("dL/da = dL/dy b^T", "dL/db = a^T dL/dy"),
    "mv": ("dL/dA = dL/dy x^T", "dL/dx = A^T dL/dy"),
    "dot": ("dL/da = dL/dy b", "dL/db = dL/dy a"),
    "linear": ("dL/dx = dL/dy w", "dL/dw = (dL/dy)^T x", "dL/db = sum of dL/dy over the rows"),
    "sum": ("dL/dx = dL/dy for every element",),
    "mean": ("dL/dx = dL/dy / n for every element",),
    "cat": ("dL/dx = its part of dL/dy",),
    "stack": ("dL/dx = its part of dL/dy",),
    "getitem": ("dL/dx = dL/dy where it was taken from, 0 elsewhere",),
    "softmax": ("dL/dx = y (dL/dy - sum of dL/dy y)",),
    "log_softmax": ("dL/dx = dL/dy - softmax(x) sum of dL/dy",),
    "logsumexp": ("dL/dx = dL/dy softmax(x)",),
    "cross_entropy": ("dL/dx = dL/dy (softmax(x) - target) / n",),
    "nll_loss": ("dL/dx = -dL/dy / n at the target, 0 elsewhere",),
    "mse_loss": ("dL/dx = dL/dy 2 (x - target) / n", "dL/dtarget = -dL/dx"),
    "max": ("dL/dx = dL/dy at the largest, 0 elsewhere",),
    "amax": ("dL/dx = dL/dy at the largest, 0 elsewhere",),
    "min": ("dL/dx = dL/dy at the smallest, 0 elsewhere",),
    "amin": ("dL/dx = dL/dy at the smallest, 0 elsewhere",),
    "dropout": ("dL/dx = dL/dy mask / (1 - p)",),
}
_GENERAL = "dL/dx = (dy/dx)^T dL/dy"
_VIEW = "dL/dx = dL/dy, put back in its place"

#: Functions of torchbp by what they compute.
FUNCTIONS = {
    "Add": "add", "Multiply": "mul", "Maximum": "maximum", "Exp": "exp",
    "Reciprocal": "reciprocal", "Scale": "scale", "Shift": "shift", "ReLU": "relu",
    "LeakyReLU": "leaky_relu", "ELU": "elu", "Sigmoid": "sigmoid", "Tanh": "tanh",
    "MatMul": "matmul", "SoftmaxCE": "cross_entropy", "Maxout": "maxout",
}  # fmt: skip


def canonical(name: str) -> str:
    """The name that the tables here know an operation by."""
    name = FUNCTIONS.get(name, name)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.endswith("_") and not name.startswith("_"):
        name = name[:-1]  # in place
    return ALIASES.get(name, name)


def pattern_of(operation: str, operands: int) -> str | None:
    """The pattern of a gate with so many operands that a gradient goes to."""
    if operation in ("mul", "div", "rdiv") and operands < 2:
        return "scale" if operation != "rdiv" else None
    return PATTERNS.get(operation)


def rule_of(operation: str, argument: int) -> str:
    """How the gradient of an operand is computed."""
    if operation in VIEWS:
        return _VIEW
    rules = RULES.get(operation, (_GENERAL,))
    return rules[min(argument, len(rules) - 1)]
