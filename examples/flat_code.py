"""The lecture's "flat" code: backpropagation without any graph, one gradient line a forward line.

The forward lines compute the output; the same lines in reverse order, each as its gradient, compute
the gradients. (Neural Networks and Backpropagation, Fundamentals of Data Science, 2023.) Run it:

    python examples/flat_code.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp.functional import sigmoid


def f(w0: Tensor, x0: Tensor, w1: Tensor, x1: Tensor, w2: Tensor) -> dict[str, Tensor]:
    """L = sigmoid(w0 x0 + w1 x1 + w2) and its gradients, line by line as in the lecture.

    Returns every value and gradient by its name in the lecture, in the order of computation.
    """
    # Forward pass: compute output
    s0 = w0 * x0
    s1 = w1 * x1
    s2 = s0 + s1
    s3 = s2 + w2
    L = sigmoid(s3)

    # Backward pass: compute grads
    grad_L = 1.0
    grad_s3 = grad_L * (1 - L) * L
    grad_w2 = grad_s3
    grad_s2 = grad_s3
    grad_s0 = grad_s2
    grad_s1 = grad_s2
    grad_w1 = grad_s1 * x1
    grad_x1 = grad_s1 * w1
    grad_w0 = grad_s0 * x0
    grad_x0 = grad_s0 * w0

    return {
        "s0": s0, "s1": s1, "s2": s2, "s3": s3, "L": L,
        "grad_s3": grad_s3, "grad_w2": grad_w2, "grad_s2": grad_s2, "grad_s0": grad_s0,
        "grad_s1": grad_s1, "grad_w1": grad_w1, "grad_x1": grad_x1, "grad_w0": grad_w0,
        "grad_x0": grad_x0,
    }  # fmt: skip


#: The values on the lecture's drawing.
INPUTS = {"w0": 2.0, "x0": -1.0, "w1": -3.0, "x1": -2.0, "w2": -3.0}


def main() -> None:
    """Print every line's value at the lecture's inputs."""
    inputs = {name: torch.tensor(value, dtype=torch.float64) for name, value in INPUTS.items()}
    for name, value in {**inputs, **f(**inputs)}.items():
        print(f"{name:8} = {value:7.4f}")


if __name__ == "__main__":
    main()
