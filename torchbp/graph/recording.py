"""What a ledger remembers of the calls themselves, for those who write them down as code again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Alias", "Call", "Recording", "Slot"]


class Slot(NamedTuple):
    """A tensor of the traced function: an output of a node of the ledger, by its id."""

    node: int
    output: int


@dataclass(frozen=True)
class Call:
    """The call that a gate is, with a Slot wherever a tensor was.

    Attributes:
        func: the torch function, or the class of a custom Function.
        args, kwargs: its arguments.
        result: what it returned, None in place of what is no tensor.
        written: (before, after) of each argument that it changed in place.
        view: whether its result is a view of its first tensor.
        random: whether it draws random numbers.
        autocast: whether autocast was on.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    written: tuple[tuple[Slot, Slot], ...] = ()
    view: bool = False
    random: bool = False
    autocast: bool = False


@dataclass(frozen=True)
class Alias:
    """A tensor that changed because memory it shares was written to through another tensor.

    Attributes:
        before: what it was.
        written: (before, after) of what was written to, in order.
    """

    before: Slot
    written: tuple[tuple[Slot, Slot], ...]


@dataclass(frozen=True)
class Recording:
    """The calls of a traced function.

    Attributes:
        name: of the function.
        calls: by the ids of their nodes.
        aliases: values that no call returned.
        names: of local variables that values were assigned to.
        differentiable: which values require a gradient.
        outputs: what the function returned.
        roots: those of them that were differentiated.
        unseen: nodes of values that were computed by calls that cannot be seen.
    """

    name: str = "f"
    calls: dict[int, Call] = field(default_factory=dict)
    aliases: dict[Slot, Alias] = field(default_factory=dict)
    names: dict[Slot, str] = field(default_factory=dict)
    differentiable: frozenset[Slot] = frozenset()
    outputs: tuple[Slot, ...] = ()
    roots: frozenset[Slot] = frozenset()
    unseen: frozenset[int] = frozenset()
