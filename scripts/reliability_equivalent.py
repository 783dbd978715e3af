"""Mutants that are the same program, for the figure "mutation" of scripts/reliability.py: a file of
its own, as what was measured does not depend on this list, only what it means.
"""

__all__ = ["EQUIVALENT"]

_SIGMOID = (
    "where(x < 0, exp(-abs(x)) - exp(-abs(x)) * (exp(-abs(x)) / (1 + exp(-abs(x)))), "
    "1 - exp(-abs(x)) / (1 + exp(-abs(x))))"
)

_NUMBER = "(kept.scalar_type() == ScalarType::Float || kept.scalar_type() == ScalarType::Double)"

#: Mutants that no test can notice, and why: what they change is the same for every input, or is
#: refused (by the same class of error, in the same words) by another check. One that is killed all
#: the same, or that is no mutant any more, has to leave the list.
EQUIVALENT: dict[str, str] = {
    **{
        f"sigmoid.forward: {_SIGMOID} -> {_SIGMOID.replace(before, after)}": why
        for before, after, why in (
            ("x < 0", "x <= 0", "at x = 0 both are 1 / 2"),
            ("1 - exp(-abs(x))", "1 - exp(-x)", "there x is not negative, or NaN"),
            (
                "1 - exp(-abs(x)) / (1 + exp(-abs(x)))",
                "1 - exp(-abs(x)) / (1 + exp(-x))",
                "there x is not negative, or NaN",
            ),
        )
    },
    "csrc/ops.h:make_loop: t->scalar_type() == loop.dtype -> true": (
        "each operation has compared the dtypes before, in words of its own"
    ),
    "csrc/trainer.h:check_operand: t.scalar_type() == dtype && t.device() == first_.device() && "
    "t.is_contiguous() -> t.scalar_type() == dtype && true && t.is_contiguous()": (
        "PyTorch looks for a kernel of the other device, and has none"
    ),
    **{
        f"csrc/trainer.h:TrainerBase: s < 2 || (kept.is_cpu() && {_NUMBER}) -> {after}": why
        for after, why in (
            (
                f"false || (kept.is_cpu() && {_NUMBER})",
                "on the CPU, where mutants are tried, check_operand has seen to it for the others",
            ),
            (
                f"s < 2 || (true && {_NUMBER})",
                "PyTorch looks for a kernel of the other device, and has none",
            ),
        )
    },
    "csrc/optim_ops.h:check_layout: check_device(op, argument, t, parameter) -> nothing": (
        "compiled for a GPU alone; on the CPU PyTorch looks for a kernel of the other device"
    ),
    **{
        f"csrc/trainer.h:{place} -> true": (
            "the memory behind a tensor can be moved to a GPU and back, and to nothing else"
        )
        for place in ("locate: t.state[2].is_cpu()", "find: t.device() == device_")
    },
    'csrc/cpu/backend.cpp:detect_level: wanted.empty() || wanted == "baseline" -> '
    'false || wanted == "baseline"': "reached with AVX2 only if something is wanted",
    **{
        "csrc/ops.h:mlp_backward: layers > 0 && saved.size() == (layers - 1) * per_layer && "
        "need_weights.size() == layers && (need_biases.empty() || need_biases.size() == layers) -> "
        f"{part} && saved.size() == (layers - 1) * per_layer && need_weights.size() == layers && "
        "(need_biases.empty() || need_biases.size() == layers)": (
            "without a layer, (layers - 1) * per_layer is larger than any size"
        )
        for part in ("true", "layers >= 0")
    },
}
