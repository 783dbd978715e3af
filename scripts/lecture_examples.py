"""The lecture's examples of backpropagation, as scripts/draw_lecture.py runs and draws them: code,
pictures, and the lecture's numbers; and its words, each with its line of code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """What the lecture says of a quantity, beside what comes out here.

    Attributes:
        quantity: its name.
        lecture: the lecture's number or word; ours is rounded to as many decimals to be compared.
        ours: an expression of what the code has made.
        formula: an expression of what the lecture's formula comes to, where it gives no number.
        wrong: whether the lecture's is an error; then ours must be another.
    """

    quantity: str
    lecture: str
    ours: str
    formula: str | None = None
    wrong: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture that the code draws: the name of its file, and what it shows."""

    file: str
    shows: str
    caption: str | None = None


@dataclass(frozen=True)
class Example:
    """A section of the page.

    Attributes:
        title: of the section.
        says: what the lecture says.
        code: runs after the code of the sections before, and may print and draw.
        pictures: what it draws. Those that have a caption stand in a table, side by side.
        numbers: are compared.
        against: whose they are.
        remark: what is to be said of them.
        prints: the language of what it prints.
    """

    title: str
    says: str
    code: str
    pictures: tuple[Picture, ...] = ()
    numbers: tuple[Number, ...] = ()
    against: str = "the lecture"
    remark: str = ""
    prints: str = "text"


INTRODUCTION = """\
Backpropagation as the lecture *Neural Networks and Backpropagation* (Fundamentals of Data Science,
December 2023) builds it up, from a graph of two gates to the product of two matrices. Each example
is code that ran as it stands here, after that of the sections before it, with what it printed and
drew, and the lecture's numbers beside ours. On an edge the value stands above, in green, and the
gradient below, in red; under a gate stands upstream times local gradient. Numbers that the slides
have in figures alone are those of Stanford's CS231n, on which they build. `python
scripts/draw_lecture.py` makes this page, and fails where a number is not the lecture's.
"""

IMPORTS = """\
import torch
from torchbp.graph import ComputationalGraph, flat, jacobian, saved, trace
"""

EXAMPLES = (
    Example(
        "A simple example",
        """f(x, y, z) = (x + y) z at x = -2, y = 5, z = -4. Name the sum q; then forward computes q
        and f, and backward, from f to the inputs, how much f changes with each of them.""",
        """\
graph = ComputationalGraph()
x, y, z = map(graph.input, "xyz")
q = graph.gate("add", x, y, name="q")
f = graph.gate("multiply", q, z, name="f")
graph.forward(x=-2, y=5, z=-4)
graph.backward()
graph.to_svg("simple.svg")
""",
        (Picture("simple.svg", "The graph of f = (x + y) z with values and gradients"),),
        (
            Number("q", "3", "q.value"),
            Number("f", "-12", "f.value"),
            Number("df/df", "1", "f.grad"),
            Number("df/dq", "-4", "q.grad"),
            Number("df/dz", "3", "z.grad"),
            Number("df/dx", "-4", "x.grad"),
            Number("df/dy", "-4", "y.grad"),
        ),
    ),
    Example(
        "Upstream times local is downstream",
        """The chain rule at one gate: df/dy = df/dq dq/dy. What arrives from the output, the
        upstream gradient, times the gate's own derivative, the local gradient, is what it hands on.
        A gate has to know nothing else of the graph. It starts with the base case, df/df = 1.""",
        """\
print(graph.ledger())
""",
        (),
        (
            Number("f: upstream, the base case", "1", "f.upstream"),
            Number("f: local, df/dq = z and df/dz = q", "[-4, 3]", "list(f.local)"),
            Number("f: downstream", "[-4, 3]", "list(f.downstream)"),
            Number("q: upstream", "-4", "q.upstream"),
            Number("q: local, dq/dx = 1 and dq/dy = 1", "[1, 1]", "list(q.local)"),
            Number("q: downstream", "[-4, -4]", "list(q.downstream)"),
        ),
    ),
    Example(
        "A neuron, gate by gate",
        """f(w, x) = 1 / (1 + exp(-(w0 x0 + w1 x1 + w2))) as a chain of gates so small that the
        derivative of each is known by heart; at w = [2, -3, -3], x = [-1, -2].""",
        """\
def neuron(w0, x0, w1, x1, w2):
    return 1 / (1 + torch.exp(-(w0 * x0 + w1 * x1 + w2)))

values = {"w0": 2.0, "x0": -1.0, "w1": -3.0, "x1": -2.0, "w2": -3.0}
chain = ComputationalGraph.from_function(neuron)
chain.forward(**values)
chain.backward()
chain.to_svg("neuron.svg")
""",
        (Picture("neuron.svg", "The neuron as a chain of multiply, add, scale, exp, shift, 1/x"),),
        (
            Number("f", "0.73", "chain.output.value"),
            Number("gradient of f", "1.00", "chain.output.grad"),
            Number("after +1", "-0.53", 'chain["shift1"].grad'),
            Number("after exp", "-0.53", 'chain["exp1"].grad'),
            Number("after ×-1", "-0.20", 'chain["scale1"].grad'),
            Number("after the sum", "0.20", 'chain["add2"].grad'),
            Number("x0: 0.2 × 2", "0.4", 'chain["x0"].grad'),
            Number("w0: 0.2 × -1", "-0.2", 'chain["w0"].grad'),
            Number("x1", "-0.59", 'chain["x1"].grad'),
            Number("w1", "-0.39", 'chain["w1"].grad'),
            Number("w2", "0.20", 'chain["w2"].grad'),
        ),
        remark="""The lecture rounds the upstream gradient to 0.2 before it multiplies. Two of its
        slides print w2 x2, where w2 is a bias, as on the others.""",
    ),
    Example(
        "Four derivatives are enough",
        """That chain wants e^x, 1/x, a x and c + x. Here all four start from x = 2 and meet an
        upstream gradient of 1, so that each sends back its local gradient; a = c = 3.""",
        """\
four = trace(
    lambda x: (torch.exp(x), 1 / x, 3 * x, 3 + x),
    torch.tensor(2.0),
    grad_output=tuple(torch.ones(4)),
)
four.to_svg("derivatives.svg")
""",
        (Picture("derivatives.svg", "exp, 1/x, 3x and 3 + x from one x, which adds what returns"),),
        (
            Number("f = e^x", "e^x", "sent(four, 'x')[0]", "math.exp(2)"),
            Number("f = 1/x", "-1/x^2", "sent(four, 'x')[1]", "-1 / 2**2"),
            Number("f = a x", "a", "sent(four, 'x')[2]", "3"),
            Number("f = c + x", "1", "sent(four, 'x')[3]"),
        ),
    ),
    Example(
        "The graph is not unique",
        """The last four gates of the neuron are the sigmoid, whose derivative is (1 - σ) σ: one
        gate instead of four, with the same gradient. Choose a graph whose local gradients are
        easily written down.""",
        """\
s = torch.tensor(1.0)
gates = trace(lambda s: 1 / (1 + torch.exp(-s)), s)
gate = trace(lambda s: torch.sigmoid(s), s)
gates.to_svg("chain.svg")
gate.to_svg("sigmoid.svg")
""",
        (
            Picture("chain.svg", "1 / (1 + exp(-s)) as four gates"),
            Picture("sigmoid.svg", "The same as one sigmoid gate"),
        ),
        (
            Number("σ(1)", "0.73", 'gate["sigmoid1"].value'),
            Number("local: (1 - 0.73) 0.73", "0.2", "gate.edges[0].local"),
            Number("dσ/ds of one gate", "0.2", 'gate.grads["s"]'),
            Number("dσ/ds of four gates", "0.2", 'gates.grads["s"]'),
        ),
    ),
    Example(
        "Patterns in gradient flow",
        """Four gates whose gradients need no arithmetic. An add gate distributes its gradient, a
        mul gate swaps its multipliers, a copy adds what returns, a max gate routes the gradient to
        the larger input.""",
        """\
upstream = torch.tensor([2.0, 5.0, 4.0, 2.0, 9.0])
add = trace(lambda x, y: x + y, *torch.tensor([3.0, 4.0]), grad_output=upstream[0])
mul = trace(lambda x, y: x * y, *torch.tensor([2.0, 3.0]), grad_output=upstream[1])
copy = trace(lambda x: (x.clone(), x.clone()), torch.tensor(7.0), grad_output=(*upstream[2:4],))
most = trace(lambda x, y: torch.maximum(x, y), *torch.tensor([4.0, 5.0]), grad_output=upstream[4])
for name, ledger in {"add": add, "mul": mul, "copy": copy, "max": most}.items():
    ledger.to_svg(f"pattern_{name}.svg")
""",
        (
            Picture("pattern_add.svg", "3 + 4 with upstream 2", "add: gradient distributor"),
            Picture("pattern_mul.svg", "2 × 3 with upstream 5", "mul: swap multiplier"),
            Picture("pattern_copy.svg", "7 copied, upstream 4 and 2", "copy: gradient adder"),
            Picture("pattern_max.svg", "max(4, 5) with upstream 9", "max: gradient router"),
        ),
        (
            Number("add gate", "distributor", 'add["add1"].pattern'),
            Number("its gradients", "[2, 2]", "list(add.grads.values())"),
            Number("mul gate", "swap multiplier", 'mul["mul1"].pattern'),
            Number("its gradients", "[15, 10]", "list(mul.grads.values())"),
            Number("copy gate", "adder", 'pattern(copy["x"])'),
            Number("its gradient", "6", 'copy.grads["x"]'),
            Number("max gate", "router", 'most["maximum1"].pattern'),
            Number("its gradients", "[0, 9]", "list(most.grads.values())"),
        ),
    ),
    Example(
        "Flat code",
        """The neuron as a program without any graph: the forward lines compute the output, and
        the gradients follow in reverse order, one line for each. `flat` writes that program for any
        function; for the neuron it writes the lecture's fifteen lines.""",
        """\
def f(w0, x0, w1, x1, w2):
    s0 = w0 * x0
    s1 = w1 * x1
    s2 = s0 + s1
    s3 = s2 + w2
    L = torch.sigmoid(s3)
    return L

inputs = torch.tensor([2.0, -1.0, -3.0, -2.0, -3.0])
trace(f, *inputs).to_svg("flat.svg")
print(flat(f, *inputs))
""",
        (Picture("flat.svg", "The neuron with one sigmoid gate"),),
        (
            Number("lines of forward", "5", "len(assignments(flat(f, *inputs), False))"),
            Number("lines of backward", "10", "len(assignments(flat(f, *inputs), True))"),
            Number("L", "0.73", "run(flat(f, *inputs), *inputs)[0]"),
            Number("grad_w0", "-0.2", "run(flat(f, *inputs), *inputs)[1]"),
            Number("grad_x0", "0.4", "run(flat(f, *inputs), *inputs)[2]"),
        ),
        prints="python",
    ),
    Example(
        "A graph object",
        """The modular way: a `ComputationalGraph` whose `forward` runs the gates in topological
        order, and whose `backward` runs them in reverse, each gate applying its little piece of the
        chain rule. Here x and q are used twice, and the two paths from q meet again.""",
        """\
def diamond(x, y):
    q = x * y
    return torch.tanh(q) * q + x

graph = ComputationalGraph.from_function(diamond)
graph.forward(x=0.5, y=2.0)
graph.backward()
graph.to_svg("diamond.svg")
print(graph)
""",
        (Picture("diamond.svg", "A graph in which x and q are used twice"),),
        (
            Number("df/dx", "", 'graph["x"].grad', "autograd(diamond, 0.5, 2.0)[0]"),
            Number("df/dy", "", 'graph["y"].grad', "autograd(diamond, 0.5, 2.0)[1]"),
        ),
        against="PyTorch's autograd",
    ),
    Example(
        "A gate of one's own",
        """In PyTorch a gate is a `torch.autograd.Function`: forward computes, and keeps what
        backward will want; backward multiplies upstream and local gradients. This is the lecture's.
        A trace shows it as one gate, and `saved` what it keeps.""",
        """\
class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        z = x * y
        return z

    @staticmethod
    def backward(ctx, grad_z):
        x, y = ctx.saved_tensors
        grad_x = y * grad_z  # dz/dx * dL/dz
        grad_y = x * grad_z  # dz/dy * dL/dz
        return grad_x, grad_y

x, y, grad_z = torch.tensor([2.0, 3.0, 5.0])
product = trace(lambda x, y: Multiply.apply(x, y), x, y, grad_output=grad_z)
product.to_svg("multiply.svg")
print(saved(lambda x, y: Multiply.apply(x, y), x, y))
""",
        (Picture("multiply.svg", "The custom Function as one gate"),),
        (
            Number("grad_x", "y × grad_z", 'product.grads["x"]', "3 * 5"),
            Number("grad_y", "x × grad_z", 'product.grads["y"]', "2 * 5"),
        ),
    ),
    Example(
        "Derivative, gradient, Jacobian",
        """From a number to a number there is a derivative; from a vector to a number a gradient,
        of the vector's shape; from N numbers to M a Jacobian, for the lecture N × M: row n says
        what x[n] does to each output. PyTorch has its transpose, output before input. Here N = 3
        and M = 2.""",
        """\
w = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -1.0]])
(derivative,) = jacobian(lambda x: x * x, torch.tensor(3.0))
(gradient,) = jacobian(lambda x: w[0] @ x, torch.ones(3))
(matrix,) = jacobian(lambda x: w @ x, torch.ones(3))
matrix.plot("jacobian_lecture.svg", layout="lecture")
matrix.plot("jacobian_torch.svg", layout="torch")
""",
        (
            Picture("jacobian_lecture.svg", "dy/dx, three rows, two columns", "the lecture's"),
            Picture("jacobian_torch.svg", "dy/dx, two rows, three columns", "PyTorch's"),
        ),
        (
            Number("x in R, y in R", "a number", "derivative.lecture_shape", "[]"),
            Number("x in R^N, y in R", "N", "gradient.lecture_shape", "[3]"),
            Number("x in R^N, y in R^M", "N × M", "matrix.lecture_shape", "[3, 2]"),
            Number("its transpose", "M × N", "matrix.shape", "[2, 3]"),
            Number("row n, column m", "dy_m/dx_n", 'matrix.explicit("lecture")', "w.T"),
        ),
    ),
    Example(
        "Vectors",
        """With vectors on the edges the loss L is still one number, and so dL/dx has the shape of
        x: for each element of x it says how much L changes with it.""",
        """\
x, w = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, -1.0], [2.0, -1.0, 1.0]])
vectors = trace(lambda w, x: torch.sum(w @ x), w, x)
vectors.to_svg("vectors.svg")
for node in vectors.nodes:
    print(f"{node.name:8} value {list(node.shape)!s:7} gradient {list(node.upstream.shape)}")
""",
        (Picture("vectors.svg", "The sum of w x, with matrix and vectors on the edges"),),
        (
            Number("dL/dx", "the shape of x", 'vectors.grads["x"].shape', "x.shape"),
            Number("dL/dw", "the shape of w", 'vectors.grads["w"].shape', "w.shape"),
            Number("dL/dL", "a number", 'vectors["sum1"].upstream.shape', "[]"),
        ),
    ),
    Example(
        "ReLU and its Jacobian",
        """max(0, x) on four numbers. Each output depends on its own input alone, so the Jacobian is
        diagonal, and nearly all of it zeros: never form it. The product with it is the upstream
        gradient where x > 0, else 0.""",
        """\
x, upstream = torch.tensor([1.0, -2.0, 3.0, -1.0]), torch.tensor([4.0, -1.0, 5.0, 9.0])
mask = trace(lambda x: torch.relu(x), x, grad_output=upstream)
mask.to_svg("relu.svg")
(relu,) = jacobian(lambda x: torch.relu(x), x)
relu.plot("relu_jacobian.svg")
for n in (4, 1_000_000):
    (cost,) = jacobian(torch.relu, torch.empty(n, device="meta")).costs()
    print(f"{n:9,} elements: {cost.explicit_bytes:,} bytes of Jacobian, or {cost.implicit_bytes:,}")
""",
        (
            Picture("relu.svg", "The ReLU gate on a vector"),
            Picture("relu_jacobian.svg", "Two ones on the diagonal, nothing else"),
        ),
        (
            Number("y", "[1, 0, 3, 0]", 'mask["relu1"].value.tensor'),
            Number("dL/dy", "[4, -1, 5, 9]", 'mask["relu1"].upstream.tensor'),
            Number(
                "dy/dx",
                "[[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]",
                'relu.explicit("lecture")',
            ),
            Number("structure", "diagonal", "relu.structure"),
            Number("dL/dx, implicitly", "[4, 0, 5, 0]", 'mask.grads["x"]'),
            Number("dL/dx, by the matrix", "[4, 0, 5, 0]", 'relu.explicit("lecture") @ upstream'),
        ),
        remark="""The bytes without a Jacobian are those of the two gradients that the product reads
        and writes.""",
    ),
    Example(
        "The product of two matrices",
        """y = x w for x [N × D] and w [D × M], with the upstream gradient dL/dy [N × M].""",
        """\
x = torch.tensor([[2.0, 1.0, -3.0], [-3.0, 4.0, 2.0]])
w = torch.tensor([[3.0, 2.0, 1.0, -1.0], [2.0, 1.0, 3.0, 2.0], [3.0, 2.0, 1.0, -2.0]])
upstream = torch.tensor([[2.0, 3.0, -3.0, 9.0], [-8.0, 1.0, 4.0, 6.0]])
matmul = trace(lambda x, w: x @ w, x, w, grad_output=upstream)
matmul.to_svg("matmul.svg")
""",
        (Picture("matmul.svg", "The product of two matrices with all values and gradients"),),
        (
            Number(
                "y",
                "[[13, 9, -2, -6], [5, 2, 17, 1]]",
                'matmul["matmul1"].value.tensor',
                wrong=True,
            ),
            Number("dL/dx = dL/dy w^T", "", 'matmul.grads["x"]', "upstream @ w.T"),
            Number("dL/dw = x^T dL/dy", "", 'matmul.grads["w"]', "x.T @ upstream"),
        ),
        remark="""The lecture prints a y that is not the product of its x and w. The gradients do
        not depend on y; it gives them as formulas, which are worked out here.""",
    ),
    Example(
        "Why the Jacobian is never formed",
        """In a network one may have N = 64, D = M = 4096. The Jacobians of the product are then
        far beyond any memory, and backpropagation must work with them implicitly. Their sizes are
        exact, and nothing is allocated: the tensors are on `meta`.""",
        """\
wide, square = torch.empty(64, 4096, device="meta"), torch.empty(4096, 4096, device="meta")
large = jacobian(lambda x, w: x @ w, wide, square)
for one in large:
    print(one.name, list(one.lecture_shape), one.bytes, "bytes")
""",
        (),
        (
            Number("dy/dx", "256 GB", 'size(large["x"].bytes)', "'256 GiB'"),
            Number("dy/dw", "256 GB", 'size(large["w"].bytes)', wrong=True),
            Number("dy/dx: (N × D) × (N × M)", "", 'large["x"].lecture_shape', "[64, 4096] * 2"),
            Number(
                "dy/dw: (D × M) × (N × M)",
                "",
                'large["w"].lecture_shape',
                "[4096, 4096, 64, 4096]",
            ),
        ),
        remark="""The lecture says 256 GB of each. That is dy/dx, in float32 and units of 2^30
        bytes; dy/dw is 64 times as large.""",
    ),
    Example(
        "What one element does",
        """Which parts of y does x[n, d] affect? The row y[n, :] alone, and y[n, m] by w[d, m]. So
        the Jacobian has w in each block of a diagonal, one block for each row, and its product with
        dL/dy is dL/dy w^T: the only product of these two matrices whose shape is that of x.""",
        """\
moved = x.clone()
moved[0, 1] += 1
print(moved @ w - x @ w)
blocks = jacobian(lambda x, w: x @ w, x, w)["x"]
blocks.plot("matmul_jacobian.svg")
for edge in matmul.operands(matmul["matmul1"]):
    print(matmul.nodes[edge.source].name, edge.rule, "Jacobian", list(edge.jacobian_shape))
""",
        (Picture("matmul_jacobian.svg", "Two blocks on the diagonal, each the entries of w"),),
        (
            Number("x[0, 1] on y[0, :]", "w[1, :]", "(moved @ w - x @ w)[0]", "w[1]"),
            Number("x[0, 1] on y[1, :]", "nothing", "(moved @ w - x @ w)[1]", "[0, 0, 0, 0]"),
            Number("structure of dy/dx", "block diagonal by row", "blocks.structure"),
            Number(
                "[N × D] = [N × M] [M × D]",
                "[2, 3]",
                "(upstream @ w.T).shape",
            ),
            Number("[D × M] = [D × N] [N × M]", "[3, 4]", "(x.T @ upstream).shape"),
        ),
        remark="""In a rule a is the gate's first operand, b its second and y its result; the
        Jacobians are in PyTorch's layout.""",
    ),
)


@dataclass(frozen=True)
class Term:
    """A word of the lecture, what it means, and the one line of a file that has these letters."""

    name: str
    means: str
    file: str
    line: str


_GRAPH = "torchbp/graph/computational_graph.py"
_FLAT = "examples/flat_code.py"
_ROWS = "csrc/gates.h"

SUMMARY = """\
Backpropagation is the chain rule, applied from gate to gate along a graph, for the gradients of all
inputs, parameters and values between. Forward computes each gate's result and saves what backward
will want; backward multiplies. Each word with its line of code:
"""

GLOSSARY = (
    Term("computational graph", "gates, and the values that run from one to the next",
         _GRAPH, "class ComputationalGraph:"),
    Term("gate, node, Function", "one operation, with a forward and a backward",
         "torchbp/functions/gate.py", "class Gate(Function):"),
    Term("forward", "run the gates in topological order",
         _GRAPH, "node.value = node._forward()"),
    Term("backward", "run the gates in reverse order",
         _GRAPH, "for node in reversed(nodes):"),
    Term("topological order", "each gate after its operands",
         _GRAPH, "TopologicalSorter(operands).static_order()"),
    Term("save for backward", "keep the values that the local gradients are made of",
         "torchbp/functions/gate.py", "ctx.save_for_backward(*tensors)"),
    Term("base case", "dL/dL = 1, where backward starts",
         _FLAT, "grad_L = 1.0"),
    Term("upstream gradient", "dL/dy, which arrives at a gate with output y",
         _GRAPH, "upstream = arrived.get(node.name)"),
    Term("local gradient", "dy/dx of the gate alone",
         _GRAPH, "self._local = self._gradients(operands, torch.ones_like(self.value))"),
    Term("downstream gradient", "upstream times local, which the gate hands on",
         _GRAPH, "node.downstream = node._gradients(operands, upstream)"),
    Term("chain rule", "dL/dx = dL/dy dy/dx; here of the sigmoid, grad_L times (1 - L) L",
         _FLAT, "grad_s3 = grad_L * (1 - L) * L"),
    Term("gradient distributor", "the add gate: each operand receives dL/dy",
         _ROWS, "ROW(add, "),
    Term("swap multiplier", "the mul gate: each operand receives the other, times dL/dy",
         _ROWS, "ROW(multiply, "),
    Term("gradient router", "the max gate: the larger operand receives dL/dy",
         _ROWS, "ROW(maximum, "),
    Term("gradient adder", "a value that is used several times adds what its uses send",
         _GRAPH, "arrived[operand.name] = sent if other is None else other + sent"),
    Term("flat code", "forward lines, then their gradients in reverse order",
         _FLAT, "def f(w0: Tensor"),
    Term("Jacobian, lecture's layout", "every output's derivative by every input, input first",
         "torchbp/graph/jacobian.py", "self.lecture_shape = x.shape + y.shape"),
    Term("Jacobian, PyTorch's layout", "the transpose, output first",
         "torchbp/graph/jacobian.py", "self.shape = y.shape + x.shape"),
    Term("implicit product", "dL/dx from dL/dy without the Jacobian",
         "torchbp/graph/jacobian.py", "def vjp(self, upstream: Tensor) -> Tensor:"),
    Term("dL/dx of a product", "dL/dy w^T: the shapes leave no other choice",
         "torchbp/functions/products.py", "# dL/dy w^T"),
    Term("dL/dw of a product", "x^T dL/dy",
         "torchbp/functions/products.py", "# x^T dL/dy"),
)  # fmt: skip
