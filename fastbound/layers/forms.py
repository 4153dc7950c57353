"""What an MLP block computes, read from the source of its forward, never from its name alone.

Three forms are known, whatever the parts are called and however the code is split into lines:

    gated    down(act(gate(x)) * up(x))
    packed   the same, with gate and up as the two halves of one projection's output
    plain    down(act(up(x)))

Modules applied to the result, such as a dropout, may follow.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn import functional as F

# Activation modules by the module and name of their exact class (subclasses do not count), so that
# transformers need not be imported. GELUTanh was PytorchGELUTanh before transformers 5.
_MODULES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "AccurateGELUActivation"): "gelu_tanh",
}
_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}


@dataclass(frozen=True)
class Form:
    """The attribute names of a block's parts.

    Attributes:
        up, down: the first and the last projection; a packed block's `up` computes gate and up.
        gate: None for a plain block; the same name as `up` for a packed block.
        activation: the activation.
        after: the modules applied to the result, in order.
    """

    up: str
    down: str
    gate: str | None
    activation: str
    after: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether one projection computes both gate and up."""
        return self.gate == self.up

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the two or three projections, first to last."""
        return tuple(dict.fromkeys(n for n in (self.gate, self.up, self.down) if n is not None))

    def __str__(self) -> str:
        first = f"{self.activation}({self.gate or self.up}(x))"
        if self.packed:
            first = f"{self.activation}(gate) * up, gate | up = {self.up}(x)"
        elif self.gate is not None:
            first += f" * {self.up}(x)"
        text = f"{self.down}({first})"
        for name in self.after:
            text = f"{name}({text})"
        return text


class UnknownForm(ValueError):
    """The forward has no known form; the message says where it differs."""


def form_of(block: nn.Module) -> Form:
    """The form of the block's forward. Raises `UnknownForm`, with the reason as a predicate."""
    kind = type(block)
    if "forward" in vars(block) or hasattr(block, "_hf_hook"):
        raise UnknownForm("has a forward of its own (accelerate's offloading?)")
    for special in ("__call__", "__getattr__"):
        if getattr(kind, special) is not getattr(nn.Module, special):
            raise UnknownForm(f"is a {kind.__name__}, which has a {special} of its own")
    try:
        return read_form(kind.forward)
    except UnknownForm as error:
        raise UnknownForm(
            f"is a {kind.__name__}, whose forward is not that of a known MLP: {error}"
        ) from None


@lru_cache(maxsize=256)
def read_form(forward: Callable[..., Any]) -> Form:
    """The form that the source of a class's forward has. Raises `UnknownForm`."""
    definition = _definition(forward)
    form = _match(_evaluate(definition))
    calls = sum(isinstance(node, ast.Call) for node in ast.walk(definition))
    if calls != len(form.projections) + 1 + len(form.after) + form.packed:
        raise UnknownForm("it calls more than its result needs")
    return form


def activation_name(activation: object) -> str | None:
    """`silu`, `gelu`, `gelu_tanh` or `relu`; None if it cannot be told to be one of them."""
    if not isinstance(activation, nn.Module):
        return next((name for known, name in _FUNCTIONS.items() if activation is known), None)
    kind = type(activation)
    if isinstance(activation, nn.GELU) and kind is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _MODULES.get((kind.__module__, kind.__qualname__))


# An expression of a forward: ("x",), ("call", name, argument), ("times", left, right),
# ("halves", argument) or ("half", index, argument).
_Expression = tuple[Any, ...]


def _definition(forward: Callable[..., Any]) -> ast.FunctionDef:
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        raise UnknownForm("it is wrapped")  # inspect would find the source of the wrapped function
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError) as error:  # made at run time, or part of a larger line
        raise UnknownForm(f"its source cannot be read ({error})") from None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise UnknownForm("it is decorated or not a plain function")
    return definition


def _evaluate(definition: ast.FunctionDef) -> _Expression:
    """The expression that straight-line code returns, with local names substituted."""
    arguments = definition.args
    names = [argument.arg for argument in arguments.args]
    if len(names) != 2 or arguments.posonlyargs or arguments.kwonlyargs or arguments.defaults:
        raise UnknownForm("it takes more than x")
    if arguments.vararg or arguments.kwarg:
        raise UnknownForm("it takes more than x")
    module, x = names
    values: dict[str, _Expression] = {x: ("x",)}
    for statement in definition.body:
        match statement:
            case ast.Expr(value=ast.Constant()):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                values[name] = _expression(value, module, values)
            case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(id=a), ast.Name(id=b)])]):
                halves = _expression(statement.value, module, values)
                if halves[0] != "halves":
                    raise UnknownForm(f"`{ast.unparse(statement)}`")
                values[a], values[b] = ("half", 0, halves[1]), ("half", 1, halves[1])
            case ast.Return(value=ast.expr() as value):
                return _expression(value, module, values)
            case _:
                raise UnknownForm(f"`{ast.unparse(statement).splitlines()[0]}`")
    raise UnknownForm("it returns nothing")


def _expression(node: ast.expr, module: str, values: dict[str, _Expression]) -> _Expression:
    match node:
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return (
                "times",
                _expression(left, module, values),
                _expression(right, module, values),
            )
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[argument], keywords=[]
        ) if owner == module and module not in values:
            return ("call", name, _expression(argument, module, values))
        case ast.Call(
            func=ast.Attribute(value=whole, attr="chunk"),
            args=[ast.Constant(value=2)],
            keywords=[ast.keyword(arg="dim", value=dim)],
        ) if ast.unparse(dim) == "-1":
            return ("halves", _expression(whole, module, values))
        case _:
            raise UnknownForm(f"`{ast.unparse(node)}`")


def _match(expression: _Expression) -> Form:
    """The form of an expression. Raises `UnknownForm`."""
    calls: list[str] = []  # outermost first
    while expression[0] == "call":
        calls.append(expression[1])
        expression = expression[2]
    if expression == ("x",) and len(calls) >= 3:
        *after, down, activation, up = calls
        return Form(up, down, None, activation, tuple(reversed(after)))
    if expression[0] == "times" and calls:
        *after, down = calls
        for active, other in (expression[1:], expression[:0:-1]):
            match (active, other):
                case (("call", act, ("call", gate, ("x",))), ("call", up, ("x",))) if gate != up:
                    pass
                case (("call", act, ("half", 0, whole)), ("half", 1, same)) if whole == same:
                    match whole:
                        case ("call", gate, ("x",)):
                            up = gate
                        case _:
                            continue
                case _:
                    continue
            return Form(up, down, gate, act, tuple(reversed(after)))
    raise UnknownForm("its terms are put together in another way")
