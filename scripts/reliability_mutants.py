"""Mutants of torchbp: one small fault each, in a row of the table or in a check of arguments.

* A row: each of its columns (forward, gradients, second order) with a changed sign, constant or
  comparison, or with a term dropped.
* A check in C++ or Python: dropped, negated, with a part of its condition dropped or a comparison
  changed.

Mutants of C++ are compiled into one extension, all of them, in a copy of the project
(`native_tree`); which one lives is said by `TORCHBP_MUTANT` when a process begins, or by `plant`.
Those of Python are functions compiled anew.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from scripts.reliability_tree import ROOT, Tree

__all__ = [
    "Mutant",
    "conditions",
    "mutants",
    "native_tree",
    "plant",
    "python_mutants",
    "table_rows",
]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        kind: "row", "native" (a check in C++) or "python" (a check in Python).
        place: `sigmoid.dx`, or a file and its function: `csrc/ops.h:check_linear`.
        before: the text as it is.
        after: the text as it would be.
        count: which of several with the same text in that place.
    """

    kind: str
    place: str
    before: str
    after: str
    count: int = 0

    def __str__(self) -> str:
        which = f" ({self.count + 1})" if self.count else ""
        return f"{self.place}: {self.before} -> {self.after}{which}"


def numbered(found: list[Mutant]) -> list[Mutant]:
    """Mutants with the same text told apart by their `count`."""
    seen: dict[Mutant, int] = {}
    result = []
    for mutant in found:
        count = seen.get(mutant, 0)
        seen[mutant] = count + 1
        result.append(Mutant(mutant.kind, mutant.place, mutant.before, mutant.after, count))
    return result


# ---- expressions of Python, which those of rows are too ------------------------------------------

#: What a comparison becomes: its border moved, and its opposite.
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip


def replacements(node: ast.expr, arithmetic: bool) -> Iterator[ast.expr]:
    """What a node could be instead of itself, were there a slip of the hand."""
    if isinstance(node, ast.Compare) and len(node.ops) >= 1:
        for i, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                changed = copy.deepcopy(node)
                changed.ops[i] = other()
                yield changed
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    if isinstance(node, ast.BoolOp) and len(node.values) > 1:
        for i in range(len(node.values)):
            kept = [*node.values[:i], *node.values[i + 1 :]]
            yield kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.Not | ast.USub)
        and (arithmetic or not isinstance(node.operand, ast.Constant))
    ):
        yield node.operand
    if not arithmetic:
        return
    if isinstance(node, ast.BinOp):
        yield node.left
        if not isinstance(node.op, ast.Div):
            yield node.right
        if isinstance(node.op, ast.Add | ast.Sub):
            other_op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield ast.BinOp(node.left, other_op, node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id != "isnan":
        yield from node.args[1:] if node.func.id == "where" else node.args


def is_zero(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0


def variants(text: str, arithmetic: bool) -> list[str]:
    """Every text that differs from an expression by one slip."""
    tree = ast.parse(text, mode="eval").body
    found: list[str] = []

    def walk(node: Any, rebuild: Callable[[Any], ast.expr]) -> None:
        if isinstance(node, ast.expr):
            found.extend(ast.unparse(rebuild(other)) for other in replacements(node, arithmetic))
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                for i, part in enumerate(value):
                    if isinstance(part, ast.AST):

                        def inside(
                            new: Any, node: Any = node, field: str = field,
                            value: Any = value, i: int = i,
                        ) -> ast.expr:  # fmt: skip
                            changed = copy.copy(node)
                            setattr(changed, field, [*value[:i], new, *value[i + 1 :]])
                            return rebuild(changed)

                        walk(part, inside)
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):

                def within(new: Any, node: Any = node, field: str = field) -> ast.expr:
                    changed = copy.copy(node)
                    setattr(changed, field, new)
                    return rebuild(changed)

                walk(value, within)

    walk(tree, lambda new: new)
    if arithmetic and not is_zero(tree):
        found += [ast.unparse(ast.UnaryOp(ast.USub(), tree)), "0"]
    original = ast.unparse(tree)
    return list(dict.fromkeys(other for other in found if other != original))


# ---- the rows of csrc/gates.h --------------------------------------------------------------------

GATES = "csrc/gates.h"

#: The macro of rows -> its columns, in their order, as bind.cpp names them.
COLUMNS = {
    "TORCHBP_UNARY_GATES": ("name", "parameter", "forward", "saves", "dx", "dxx"),
    "TORCHBP_BINARY_GATES": ("name", "forward", "saves", "da", "db", "daa", "dab", "dbb"),
}
NO_EXPRESSION = ("name", "parameter", "saves")


def closing(text: str, begin: int) -> int:
    """Where the parenthesis closes that opens at `begin`; strings are passed over."""
    depth, i = 0, begin
    while True:
        if text[i] == '"':
            i += 1
            while text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
        i += 1


def split(text: str, at: tuple[str, ...] = (",",)) -> list[tuple[str, str]]:
    """(part, what separated it from the part before) of a text, outside of any parenthesis."""
    parts: list[tuple[str, str]] = []
    begin, i, before = 0, 0, ""
    while i < len(text):
        if text[i] in "([{" or text[i] == '"':
            i = closing(text, i) + 1 if text[i] != '"' else text.index('"', i + 1) + 1
            continue
        for word in at:
            if text.startswith(word, i):
                parts.append((text[begin:i].strip(), before))
                i, begin, before = i + len(word), i + len(word), word
                break
        else:
            i += 1
    return [*parts, (text[begin:].strip(), before)]


@dataclass(frozen=True)
class Cell:
    """A column of a row, and where its text stands in the header."""

    row: str
    column: str
    text: str
    begin: int
    end: int


def cells(header: str) -> list[Cell]:
    """The columns of every row, as the header spells them."""
    found = []
    for macro, names in COLUMNS.items():
        at = header.index(f"#define {macro}(ROW)")
        end = re.compile(r"[^\\]\n|\Z").search(header, at)
        assert end is not None
        for row in re.finditer(r"\bROW\((?=\w)", header[at : end.end()]):
            begin = at + row.end() - 1
            if header[begin:].startswith("(ROW)"):
                continue
            inside = header[begin + 1 : closing(header, begin)]
            if inside == "ROW":
                continue
            parts = [part for part, _ in split(inside)]
            if len(parts) != len(names):
                raise ValueError(
                    f"{GATES}: a row of {macro} wants {len(names)} columns, got {len(parts)}: "
                    f"{parts[0]}"
                )
            position = begin + 1
            for name, text in zip(names, parts, strict=True):
                position = header.index(text, position)
                if name not in NO_EXPRESSION:
                    found.append(Cell(parts[0], name, text, position, position + len(text)))
                position += len(text)
    if not found:
        raise ValueError(f"{GATES}: no row found")
    return found


@cache
def row_mutants() -> list[Mutant]:
    return [
        Mutant("row", f"{cell.row}.{cell.column}", cell.text, other)
        for cell in cells((ROOT / GATES).read_text())
        for other in variants(cell.text, arithmetic=True)
    ]


def in_type(text: str) -> str:
    """A column's text in the type that a kernel computes in (C, as columns.h calls it)."""
    return f"static_cast<C>({text})"


def header_with_mutants(header: str, numbers: dict[tuple[str, str], list[tuple[int, str]]]) -> str:
    """gates.h in which each column is all of its mutants, one of them alive."""
    for cell in sorted(cells(header), key=lambda cell: -cell.begin):
        if cell.column in ("dxx", "daa", "dab", "dbb"):  # no kernel reads them
            continue
        own = numbers.get((cell.row, cell.column), [])
        choices = "".join(
            f"torchbp_mutant == {number} ? {in_type(text)} : " for number, text in own
        )
        header = f"{header[: cell.begin]}({choices}{in_type(cell.text)}){header[cell.end :]}"
    return with_declaration(header)


def with_declaration(header: str) -> str:
    """A header that may be the first to name `torchbp_mutant`."""
    return header.replace("#pragma once\n", f"#pragma once\n\n{DECLARATION}", 1)


DECLARATION = """// Which one lives: 0 for none.
extern "C" __attribute__((visibility("default"))) int torchbp_mutant;
"""
DEFINITION = """#include <cstdlib>

extern "C" __attribute__((visibility("default"))) int torchbp_mutant;
static int which() {
  const char* const text = std::getenv("TORCHBP_MUTANT_NUMBER");
  return text ? std::atoi(text) : 0;
}
int torchbp_mutant = which();
"""


def table_rows() -> list[dict[str, str]]:
    """What `_C.rows()` gives in a copy, where the kernels' text is that of all mutants: the rows as
    gates.h has them, or has them with the mutant that `TORCHBP_MUTANT` names.
    """
    text = os.environ.get("TORCHBP_MUTANT")
    alive = Mutant(**json.loads(text)) if text else None
    header = (ROOT / ORIGINAL).read_text()
    rows: dict[str, dict[str, str]] = {}
    for macro, names in COLUMNS.items():
        part = header[header.index(f"#define {macro}(ROW)") :]
        for found in re.finditer(r"^ +ROW\(", part, re.M):
            inside = part[found.end() : closing(part, found.end() - 1)]
            values = [value for value, _ in split(inside)]
            if len(values) == len(names):
                row = dict(zip(names, values, strict=True))
                row.setdefault("parameter", "none")
                row["inputs"] = "x" if "dx" in row else "a, b"
                rows[row["name"]] = row
    for cell in cells(header):
        if alive is not None and alive.place == f"{cell.row}.{cell.column}":
            rows[cell.row][cell.column] = alive.after
    return list(rows.values())


# ---- checks in C++ -------------------------------------------------------------------------------

CHECKED = ("csrc/*.h", "csrc/*.cpp", "csrc/cpu/*.h", "csrc/cpu/*.cpp")
ORIGINAL = "csrc/gates_original.h"


@dataclass(frozen=True)
class Condition:
    """The condition of a check in C++, or (`call`) a call of a function that checks."""

    path: str
    function: str
    text: str
    begin: int
    end: int
    call: bool


def without_comments(text: str) -> str:
    """The text with blanks for its comments."""
    return re.sub(r"//[^\n]*", lambda found: " " * len(found.group()), text)


def function_at(text: str, place: int) -> str:
    """The name of the function that a place in C++ is in."""
    name = "?"
    for found in re.finditer(
        r"^(?:[\w:<>,&*~\[\] ]+?[ &*])?(\w+)\([^;{}]*\)[^;{}()]*\{\n?", text[:place], re.M
    ):
        if found.group(1) not in ("if", "for", "while", "switch"):
            name = found.group(1)
    return name


def conditions(path: str, whole: str) -> list[Condition]:
    """Every check in a C++ source, in the order in which they stand."""
    text, found = without_comments(whole), []
    for check in re.finditer(r"\bSTD_TORCH_CHECK\(", text):
        inside = text[check.end() : closing(text, check.end() - 1)]
        raw = split(inside)[0][0]
        begin = text.index(raw, check.end())
        where = function_at(text, begin)
        found.append(Condition(path, where, raw, begin, begin + len(raw), False))
    for check in re.finditer(r"(?<=[;{})\s])check(_\w+)?\(", text):
        end = closing(text, check.end() - 1) + 1
        before = text[: check.start()].rstrip()
        if text[end : end + 1] != ";" or not before.endswith((";", "{", "}", ")")):
            continue  # a definition, or an expression
        where, call = function_at(text, check.start()), text[check.start() : end]
        found.append(Condition(path, where, call, check.start(), end, True))
    return sorted(found, key=lambda condition: condition.begin)


#: What a comparison becomes: its border moved, or its opposite where it has none.
CXX_COMPARISONS = {"==": "!=", "!=": "==", "<=": "<", ">=": ">", "<": "<=", ">": ">="}


def cxx_variants(text: str) -> Iterator[str]:
    """What a condition could be instead: dropped, negated, a part dropped, a comparison changed."""
    flat = " ".join(text.split())
    if flat == "false":
        return  # the end of a search: without it there is no program
    yield "true"
    yield f"!({flat})"
    # Of an equality alone, that is the same.
    yield from (other for other in cxx_parts(flat, lambda new: new) if other != inverse(flat))


def inverse(text: str) -> str:
    """An equality that is a whole condition, as its opposite; other conditions as they are."""
    sides = split(text, (" == ", " != ", "&&", "||", "?"))
    if len(sides) != 2 or sides[1][1] not in (" == ", " != "):
        return text
    return f"{sides[0][0]} {CXX_COMPARISONS[sides[1][1].strip()]} {sides[1][0]}"


def cxx_parts(text: str, rebuild: Callable[[str], str]) -> Iterator[str]:
    """Every text with a part of a conjunction dropped, or a comparison changed."""
    if len(split(text, ("?",))) > 1:
        return  # a choice between conditions
    for joint, neutral in (("||", "false"), ("&&", "true")):
        parts = [part for part, _ in split(text, (joint,))]
        if len(parts) > 1:
            for i, part in enumerate(parts):

                def with_part(
                    new: str, i: int = i, parts: list[str] = parts, joint: str = joint
                ) -> str:
                    return rebuild(f" {joint} ".join([*parts[:i], new, *parts[i + 1 :]]))

                yield with_part(neutral)
                yield from cxx_parts(part, with_part)
            return
    if text.startswith("(") and closing(text, 0) == len(text) - 1:
        yield from cxx_parts(text[1:-1], lambda new: rebuild(f"({new})"))
        return
    if text.startswith("!(") and closing(text, 1) == len(text) - 1:
        yield from cxx_parts(text[2:-1], lambda new: rebuild(f"!({new})"))
        return
    words = tuple(f" {word} " for word in sorted(CXX_COMPARISONS, key=len, reverse=True))
    sides = split(text, words)
    if len(sides) == 2:
        left, (right, word) = sides[0][0], sides[1]
        yield rebuild(f"{left} {CXX_COMPARISONS[word.strip()]} {right}")


@cache
def native_conditions() -> list[Condition]:
    paths = sorted({path for pattern in CHECKED for path in ROOT.glob(pattern)})
    return [
        condition
        for path in paths
        for condition in conditions(str(path.relative_to(ROOT)), path.read_text())
    ]


def mutants_of(condition: Condition) -> list[Mutant]:
    place, text = f"{condition.path}:{condition.function}", " ".join(condition.text.split())
    if condition.call:
        return [Mutant("native", place, text, "nothing")]
    others = dict.fromkeys(cxx_variants(condition.text))
    return [Mutant("native", place, text, other) for other in others]


@cache
def native_mutants() -> list[Mutant]:
    return numbered(
        [mutant for condition in native_conditions() for mutant in mutants_of(condition)]
    )


def source_with_mutants(path: str, text: str, numbers: dict[Mutant, int]) -> str:
    """A C++ source in which each check is all of its mutants, one of them alive."""
    own = conditions(path, text)
    named = iter([mutant for mutant in numbers if mutant.place.startswith(f"{path}:")])
    edits = []
    for condition in own:
        mutants = [next(named) for _ in mutants_of(condition)]
        if condition.call:
            new = f"if (torchbp_mutant != {numbers[mutants[0]]}) {condition.text}"
        else:
            choices = "".join(
                f"torchbp_mutant == {numbers[mutant]} ? bool({mutant.after}) : "
                for mutant in mutants
            )
            new = f"({choices}bool({condition.text}))"
        edits.append((condition.begin, condition.end, new))
    for begin, end, new in reversed(edits):
        text = text[:begin] + new + text[end:]
    return with_declaration(text) if path.endswith(".h") else text


@cache
def native_numbers() -> dict[Mutant, int]:
    """What the extension calls the mutants that it holds."""
    return {mutant: i + 1 for i, mutant in enumerate([*row_mutants(), *native_mutants()])}


@cache
def native_tree() -> Tree:
    """The copy whose extension holds every mutant of the rows and of the checks in C++."""
    header = (ROOT / GATES).read_text()
    numbers = native_numbers()
    by_cell: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for mutant in row_mutants():
        row, column = mutant.place.split(".")
        by_cell.setdefault((row, column), []).append((numbers[mutant], mutant.after))
    changes = {
        ORIGINAL: header,
        GATES: header_with_mutants(header, by_cell),
        "csrc/mutant.cpp": DEFINITION,
        "torchbp/functions/table.py": table_of_a_copy(),
    }
    for path in dict.fromkeys(condition.path for condition in native_conditions()):
        changes[path] = source_with_mutants(path, (ROOT / path).read_text(), numbers)
    setup = (ROOT / "setup.py").read_text()
    changes["setup.py"] = setup.replace('"-O3"', '"-O1"')  # minutes less to build
    return Tree("mutants", {}, changes)


def table_of_a_copy() -> str:
    text, wanted = (ROOT / "torchbp/functions/table.py").read_text(), "_C.rows()"
    if text.count(wanted) != 1:
        raise ValueError(f"torchbp/functions/table.py wants {wanted} once")
    return text.replace(
        wanted, '__import__("scripts.reliability_mutants", fromlist=[""]).table_rows()'
    )


# ---- checks in Python ----------------------------------------------------------------------------

PYTHON = ("torchbp/functions/*.py", "torchbp/functional.py")


class Finder(ast.NodeTransformer):
    """Lists the mutants of a module's checks, or (`wanted`) makes one of them."""

    def __init__(self, path: str, wanted: Mutant | None = None) -> None:
        self.path, self.wanted = path, wanted
        self.found: list[Mutant] = []
        self.seen: dict[Mutant, int] = {}
        self.names: list[str] = []

    def _alive(self, before: str, after: str) -> bool:
        """Notes a mutant; whether it is the one that is wanted."""
        base = Mutant("python", f"{self.path}:{'.'.join(self.names)}", before, after)
        count = self.seen.get(base, 0)
        self.seen[base] = count + 1
        mutant = Mutant(base.kind, base.place, before, after, count)
        self.found.append(mutant)
        return mutant == self.wanted

    def _inside(self, node: Any) -> Any:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()
        return node

    visit_FunctionDef = visit_ClassDef = _inside

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not isinstance(node.body[-1], ast.Raise):
            return node
        text = ast.unparse(node.test)
        negated = text.removeprefix("not ") if text.startswith("not ") else f"not ({text})"
        for after in dict.fromkeys(["False", negated, *variants(text, arithmetic=False)]):
            if after != text and self._alive(text, after):
                node.test = ast.parse(after, mode="eval").body
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if isinstance(call, ast.Call) and is_check(call.func):
            text = ast.unparse(call)
            if self._alive(text, "nothing"):
                return ast.Pass()
        return node


#: Functions of torchbp.functions.check, as that module calls them.
OWN_CHECKS = {"tensor", "floating", "like", "device", "shape"}


def is_check(function: ast.expr) -> bool:
    """Whether a call is one of a function that only checks: check.like, check_affine."""
    if isinstance(function, ast.Attribute):
        return isinstance(function.value, ast.Name) and function.value.id == "check"
    return isinstance(function, ast.Name) and (
        function.id in OWN_CHECKS or function.id.startswith("check_")
    )


@cache
def python_mutants() -> list[Mutant]:
    found = []
    for path in sorted({path for pattern in PYTHON for path in ROOT.glob(pattern)}):
        finder = Finder(str(path.relative_to(ROOT)))
        finder.visit(ast.parse(path.read_text()))
        found += finder.found
    return found


def planted_code(text: str, mutant: Mutant) -> CodeType:
    """The code of the function that a mutant is in, with the mutant."""
    path, _, names = mutant.place.partition(":")
    finder = Finder(path, mutant)
    tree = ast.fix_missing_locations(finder.visit(ast.parse(text)))
    if mutant not in finder.found:
        raise ValueError(f"no such mutant: {mutant}")
    code = compile(tree, path, "exec", dont_inherit=True)
    for name in names.split("."):
        code = next(
            part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name
        )
    return code


def plant(mutant: Mutant, number: int = 0) -> None:
    """Make a mutant alive in this process, in which torchbp is imported."""
    import torchbp

    if mutant.kind == "python":
        plant_in_python(mutant)
        return
    library = ctypes.CDLL(torchbp._C.__file__)
    ctypes.c_int.in_dll(library, "torchbp_mutant").value = number
    os.environ["TORCHBP_MUTANT_NUMBER"] = str(number)  # in a process that a test starts
    if mutant.kind == "row":
        os.environ["TORCHBP_MUTANT"] = json.dumps(asdict(mutant))
        changed = {row["name"]: row for row in table_rows()}
        row = torchbp.ROWS[mutant.place.partition(".")[0]]
        parsed = type(row).parse(changed[row.name])
        for name in ("columns", "code"):  # whoever holds the row has it
            object.__setattr__(row, name, getattr(parsed, name))


def plant_in_python(mutant: Mutant) -> None:
    path, _, name = mutant.place.partition(":")
    module = path.removesuffix(".py").replace("/", ".")
    code, found = planted_code((ROOT / path).read_text(), mutant), 0
    for thing in gc.get_objects():
        if (
            isinstance(thing, FunctionType)
            and thing.__module__ == module
            and thing.__qualname__.replace(".<locals>", "") == name
        ):
            thing.__code__, found = code, found + 1
    if not found:
        raise ValueError(f"no function {name} in {module}")


def mutants() -> list[Mutant]:
    """Every mutant, with a name of its own."""
    return [*row_mutants(), *native_mutants(), *python_mutants()]
