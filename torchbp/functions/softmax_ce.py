"""SoftmaxCE: softmax and cross-entropy as one gate."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import check
from .gate import Gate, auxiliary, call, eager, fast_backward, is_traced, plain, raw, save, unused

__all__ = ["REDUCTIONS", "SoftmaxCE", "softmax_ce_loss"]

_forward, _backward = raw("softmax_ce"), raw("softmax_ce_backward")
_with_gradient = raw("softmax_ce_with_gradient")

#: Reduction -> the number that the raw operations take.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def weighted_target(
    input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> Tensor:
    """w q [N, C]: the target distribution, smoothed, times the class weights."""
    classes = input.shape[1]
    if target.dtype == torch.int64:
        q = torch.arange(classes, device=target.device) == target.unsqueeze(1)
        q = (1 - smoothing) * q.to(input.dtype) + smoothing / classes
    else:
        q = (1 - smoothing) * target + smoothing / classes
    return q if weight is None else q * weight


def kept(target: Tensor, ignore_index: int, grad: Tensor) -> Tensor:
    """A gradient [N, C] with zeros on the rows that count nothing."""
    if target.is_floating_point():
        return grad
    return torch.where((target != ignore_index).unsqueeze(1), grad, 0)


class SoftmaxCE(Gate):
    """The softmax classifier's loss, L_i = -log P(y_i) with P = softmax of the logits.

    Args (of apply):
        input: [N, C] logits ("scores").
        target: [N] class indices (int64), or [N, C] class probabilities (dtype of input).
        weight: [C] a factor for each class, or None.
        ignore_index: rows whose class index is this count nothing.
        reduction: "mean", "sum" or "none". The mean of class indices divides by the weights of
            their classes, that of probabilities by N.
        label_smoothing: s in [0, 1]: the target becomes (1 - s) q + s / C.

    Returns (loss, lse, total): loss is one number, or [N] for reduction "none"; lse [N] is the
    log-sum-exp of each row, all that backward needs beside the inputs (never an N x C copy); total
    is what a mean was divided by. lse and total are float32 unless input is float64.

    With p = softmax(input): L_i = sum_c w_c q_c (lse_i - input_c), and
    dL_i/dinput_c = p_c sum_k w_k q_k - w_c q_c, which is p - onehot(y_i) in the plain case.

    Example:
        >>> scores = torch.tensor([[3.2, 5.1, -1.7]])
        >>> loss, lse, _ = SoftmaxCE.apply(scores, torch.tensor([0]))
        >>> f"{loss.item():.2f}"  # the lecture: -log(0.13) = 2.04
        '2.04'
    """

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if unsure(target, ignore_index, label_smoothing):
            SoftmaxCE.check(input, target, weight, ignore_index, reduction, label_smoothing)
        return _forward(input, target, weight, ignore_index, REDUCTIONS[reduction], label_smoothing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, *ctx.options = inputs
        _, lse, total = output
        if weight is not None and weight.requires_grad:
            raise ValueError("cross_entropy: weight has no gradient; got one that requires grad")
        auxiliary(ctx, lse, constant=(total,))
        save(ctx, input, target, weight, lse, total)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        input, target, weight, lse, total = ctx.saved_tensors
        ignore_index, reduction, smoothing = ctx.options
        need_input, need_target, *_ = ctx.needs_input_grad
        if grad_loss is not None and unused(grad_lse) and fast_backward(grad_loss):
            grads = _backward(
                grad_loss, input, target, weight, lse, total, ignore_index, REDUCTIONS[reduction],
                smoothing, need_input, need_target,
            )  # fmt: skip
            return grads[0] if need_input else None, grads[1] if need_target else None, *[None] * 4

        # The same from operations that can be differentiated again: lse is an output of this
        # Function, so that the dependence of p on the input is on record.
        grad_input = grad_target = None
        p = torch.exp(input - lse.unsqueeze(1).to(input.dtype))
        if grad_loss is not None:
            row = grad_loss if reduction == "none" else grad_loss / total.to(input.dtype)
            row = row.expand(input.shape[0]).unsqueeze(1)
            q = weighted_target(input, target, weight, smoothing)
            if need_input:
                grad_input = kept(target, ignore_index, row * (p * q.sum(1, keepdim=True) - q))
            if need_target:
                log_p = input - lse.unsqueeze(1).to(input.dtype)
                grad_target = row * -(1 - smoothing) * (log_p if weight is None else log_p * weight)
        if grad_lse is not None and need_input:
            of_lse = grad_lse.unsqueeze(1).to(input.dtype) * p
            grad_input = of_lse if grad_input is None else grad_input + of_lse
        return grad_input, grad_target, *[None] * 4

    @staticmethod
    def jvp(
        ctx: Any, input_t: Tensor | None, target_t: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, None]:
        input, target, weight, lse, total = ctx.saved_tensors
        ignore_index, reduction, smoothing = ctx.options
        log_p = input - lse.unsqueeze(1).to(input.dtype)
        p = torch.exp(log_p)
        rows, lse_t = torch.zeros_like(p[:, 0]), torch.zeros_like(lse)
        if input_t is not None:
            q = weighted_target(input, target, weight, smoothing)
            local = kept(target, ignore_index, p * q.sum(1, keepdim=True) - q)
            rows = rows + (input_t * local).sum(1)
            lse_t = lse_t + (input_t * p).sum(1).to(lse.dtype)
        if target_t is not None:
            rows = rows - (1 - smoothing) * (
                target_t * (log_p if weight is None else log_p * weight)
            ).sum(1)
        if reduction == "none":
            return rows, lse_t, None
        return rows.sum() / total.to(input.dtype), lse_t, None

    @staticmethod
    def check(
        input: Any,
        target: Any,
        weight: Any = None,
        ignore_index: Any = -100,
        reduction: Any = "mean",
        label_smoothing: Any = 0.0,
    ) -> None:
        op = "cross_entropy"
        check.floating(op, "input", input)
        check.shape(op, "input", input, ("N", "C"))
        n, classes = input.shape
        check.tensor(op, "target", target)
        check.device(op, "target", target, "input", input)
        check.integer(op, "ignore_index", ignore_index)
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"{op}: ignore_index wants an int64, got {ignore_index}")
        check.choice(op, "reduction", reduction, tuple(REDUCTIONS))
        if not 0 <= check.number(op, "label_smoothing", label_smoothing) <= 1:
            raise ValueError(f"{op}: label_smoothing wants 0 to 1, got {label_smoothing}")
        if weight is not None:
            check.like(op, "weight", weight, "input", input)
            check.shape(op, "weight", weight, (classes,))
            if weight.requires_grad:
                raise ValueError(f"{op}: weight has no gradient; got one that requires grad")
        if target.dtype == torch.int64:
            check_target(target, (n,), input.shape)
            check_classes(target, classes, ignore_index)
        elif target.is_floating_point():
            check.like(op, "target", target, "input", input)
            check_target(target, (n, classes), input.shape)
            if ignore_index >= 0:
                raise ValueError(
                    f"{op}: ignore_index wants class indices as target, "
                    f"got {ignore_index} with class probabilities"
                )
        else:
            raise TypeError(
                f"{op}: target wants class indices (int64) or class probabilities "
                f"({str(input.dtype).removeprefix('torch.')}), "
                f"got {str(target.dtype).removeprefix('torch.')}"
            )

    @staticmethod
    def formula(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = torch.nn.functional.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
        return loss, torch.logsumexp(input, 1), torch.ones_like(loss)


def check_target(target: Tensor, wanted: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the target of an input of some shape has the shape that it wants."""
    if target.shape != wanted:
        kind = "class probabilities" if target.is_floating_point() else "class indices"
        raise ValueError(
            f"cross_entropy: target wants shape {tuple(wanted)} as {kind} for input of shape "
            f"{tuple(shape)}, got {tuple(target.shape)}"
        )


def unsure(target: Tensor, ignore_index: int, label_smoothing: float) -> bool:
    """Whether the arguments want a closer look: what the kernels could not tell from good input."""
    return (
        type(ignore_index) is not int
        or type(label_smoothing) is not float
        or not 0 <= label_smoothing <= 1
        or (ignore_index >= 0 and target.is_floating_point())
    )


class Eager(Function):
    """SoftmaxCE's loss in plain eager mode: forward writes the gradient as well.

    One pass over the logits instead of two, and backward only hands the gradient out, scaled by
    dL/dloss. It takes the memory that backward would take a moment later. Whatever differentiates
    the gradient itself goes through SoftmaxCE.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        number = REDUCTIONS[reduction]
        loss, gradient = _with_gradient(
            input, target, weight, ignore_index, number, label_smoothing
        )
        ctx.save_for_backward(input, target, weight, gradient)
        ctx.options = ignore_index, reduction, label_smoothing
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, gradient = ctx.saved_tensors
        again = not fast_backward(grad_loss)
        known = not (again or is_traced() or type(grad_loss) is not Tensor)
        if known and on_gpu(gradient):
            # A kernel looks at the factor: the GPU would have to be waited for to see it here.
            gradient = gradient.clone() if _keeps_graph() else gradient
            ignore_index, reduction, smoothing = ctx.options
            try:
                torch.ops.torchbp_cuda.softmax_ce_scale_(
                    gradient, grad_loss, input, target, weight, ignore_index, REDUCTIONS[reduction],
                    smoothing,
                )  # fmt: skip
            except RuntimeError as error:
                raise_late(error)
            return gradient, *[None] * 5
        factor = grad_loss.item() if known else 1.0
        # An ignored row has gradient 0 whatever arrives, which 0 times infinity is not.
        if again or not math.isfinite(factor):
            with torch.enable_grad():
                loss, *_ = SoftmaxCE.apply(input, target, weight, *ctx.options)
                (gradient,) = torch.autograd.grad(loss, input, grad_loss, create_graph=again)
        elif not known or _keeps_graph():
            gradient = gradient * grad_loss  # the gradient may be wanted once more
        elif factor != 1:
            gradient.mul_(grad_loss)
        return gradient, *[None] * 5


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU."""
    return tensor.is_cuda


def raise_late(error: Exception) -> NoReturn:
    """Raise an error, as an IndexError if an operation found a class index out of range.

    A GPU is not waited for: such an index is reported, by any later call, when the kernel has run.
    """
    message = str(error)
    begin = message.find("target wants class indices")
    if begin < 0:
        raise error
    raise IndexError(f"cross_entropy: {message[begin:].splitlines()[0]}") from None


_apply_eager = eager(Eager, SoftmaxCE)
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def softmax_ce_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """The loss of SoftmaxCE, the fastest way; the arguments are those of SoftmaxCE.apply."""
    arguments = input, target, weight, ignore_index, reduction, label_smoothing
    try:
        if (
            input.requires_grad
            and (input.is_cpu or on_gpu(input))
            and reduction != "none"
            and plain()
            and not target.requires_grad
            and not (isinstance(weight, Tensor) and weight.requires_grad)
            and not unsure(target, ignore_index, label_smoothing)
        ):
            return _apply_eager(*arguments)  # type: ignore[no-any-return]
        loss, *_ = call(SoftmaxCE, *arguments)
    except RuntimeError as error:
        raise_late(error)
    return loss


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for a class index out of range.

    Only where the values can be read: not on fake or meta tensors, nor inside torch.func.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if target.is_meta or type(target) is not Tensor:
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise IndexError(
            f"cross_entropy: target wants class indices from 0 to {classes - 1} "
            f"(or ignore_index {ignore_index}), got {int(target[i])} at position {i}"
        )
