"""Modules that read a layer's weight instead of calling the layer: an adapter there would not run.

They are found in the source of the forward of every module around the layer, and of the methods
that it calls: `self.out_proj.weight` in `nn.MultiheadAttention`, `self.dt_proj.weight` in Mamba's
mixer, `self.linear1.weight` in the fast path of `nn.TransformerEncoderLayer`. If the source cannot
be read, or passes the layer on to another function, nothing is known and the layer is not refused.
Branches that the module's own settings rule out do not count, nor do those for an argument that is
None by default.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

# Uses that do not depend on the weight's values, such as x.to(self.wo.weight.dtype).
_ABOUT = {
    *("dtype", "device", "shape", "ndim", "size", "dim", "numel", "stride", "layout", "type"),
    *("requires_grad", "grad", "is_meta", "is_floating_point", "is_complex", "is_cuda"),
    *("is_contiguous", "element_size", "itemsize"),
}
_ASKING = ("isinstance", "hasattr", "type", "id")

_Path = tuple[str, ...]  # attribute names below self; "*" is any one of them, as in self.layers[i]


class _Branch(NamedTuple):
    """A test that must come out as `wanted` for a line to run."""

    test: str
    wanted: bool


class _Read(NamedTuple):
    """A layer whose weight is read, and the tests that this read depends on."""

    layer: _Path
    branches: tuple[_Branch, ...]


def weight_reader(model: nn.Module, name: str) -> str | None:
    """Why an adapter on the named layer would not always run, as a predicate; None if it would."""
    layer = model.get_submodule(name)
    for each, module in model.named_modules(remove_duplicate=False):
        if module is not layer:
            continue
        parts = each.split(".")
        for depth in range(len(parts)):
            owner = model.get_submodule(".".join(parts[:depth]))
            kind: Any = type(owner)
            if any(
                _fits(read.layer, parts[depth:]) and _runs(read.branches, owner)
                for read in weights_read(kind)
            ):
                return (
                    f"has its weight read by the {kind.__name__} around it, which does not always "
                    "call the layer: an adapter on it would be skipped"
                )
    return None


def _fits(path: _Path, parts: list[str]) -> bool:
    pairs = zip(path, parts, strict=False)
    return len(path) == len(parts) and all(p in ("*", part) for p, part in pairs)


def _runs(branches: tuple[_Branch, ...], owner: nn.Module) -> bool:
    return all(_value(branch.test, owner) in (branch.wanted, None) for branch in branches)


def _value(test: str, owner: nn.Module) -> bool | None:
    try:
        return bool(eval(test, {"__builtins__": {}}, {"self": owner}))
    except Exception:  # an attribute that is not there yet, or values that do not compare
        return None


@lru_cache(maxsize=1024)
def weights_read(kind: type[nn.Module]) -> frozenset[_Read]:
    """The layers whose weight the forward of a class reads."""
    found: set[_Read] = set()
    reached, waiting = {"forward"}, ["forward"]
    while waiting:
        for definition in _definitions(kind, waiting.pop()):
            reading = _Reading(definition)
            found |= reading.weights
            called = {n for n in reading.own if _source_of(inspect.getattr_static(kind, n, None))}
            waiting += sorted(called - reached)
            reached |= called
    return frozenset(found)


def _definitions(kind: type[nn.Module], name: str) -> Iterator[ast.FunctionDef]:
    """The methods that run under that name: the class's own and, if it uses super(), the next."""
    for each in kind.__mro__:
        if each is nn.Module:
            return
        if name in vars(each):
            source = _source_of(vars(each)[name])
            if source is None:
                return
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(source))).body[0]
            except (OSError, TypeError, SyntaxError):
                return
            if isinstance(tree, ast.FunctionDef):
                yield tree
            if not any(isinstance(n, ast.Name) and n.id == "super" for n in ast.walk(tree)):
                return


def _source_of(member: Any) -> Any:
    """The function behind a method or property, or None if there is none."""
    function = member.fget if isinstance(member, property) else member
    function = inspect.unwrap(function) if callable(function) else None
    return function if inspect.isfunction(function) else None


class _Reading:
    """What one method reads: layers' weights (`weights`) and attributes of self (`own`)."""

    def __init__(self, definition: ast.FunctionDef) -> None:
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        self.names: dict[str, _Path] = {arguments[0].arg: ()} if arguments else {}
        self.absent = _none_by_default(definition)
        nodes = list(ast.walk(definition))
        for _ in range(2):  # a local name may refer to a part through another local name
            for node in nodes:
                self._keep_name(node)
        self.own: set[str] = set()
        self.weights: set[_Read] = set()
        self._visit(definition, ())

    def _visit(self, node: ast.AST, branches: tuple[_Branch, ...]) -> None:
        if isinstance(node, ast.If | ast.IfExp):
            self._visit(node.test, branches)
            # In the body of `if a and b` both are true; in its else only `a and b` is known.
            match node.test:
                case ast.BoolOp(op=ast.And(), values=tests):
                    pass
                case _:
                    tests = [node.test]
            for parts, asked, wanted in (
                (node.body, tests, True),
                (node.orelse, [node.test], False),
            ):
                known = (self._test(test) for test in asked)
                inner = (*branches, *(_Branch(test, wanted) for test in known if test))
                for part in parts if isinstance(parts, list) else [parts]:
                    self._visit(part, inner)
            return
        path = self._path(node) if isinstance(node, ast.Attribute) else None
        if path is not None and len(path) == 1:
            self.own.add(path[0])
        elif path is not None and path[-1] == "weight":
            self.weights.add(_Read(path[:-1], branches))
        skipped = _asked_about(node)
        for child in ast.iter_child_nodes(node):
            if child is not skipped:
                self._visit(child, branches)

    def _test(self, test: ast.expr) -> str | None:
        """The test as source if it uses only attributes of self and None arguments, else None."""
        test = _Filled(self.absent, {n for n, p in self.names.items() if p == ()}).visit(
            ast.parse(ast.unparse(test), mode="eval").body
        )
        for node in ast.walk(test):
            match node:
                case ast.Name(id="self") | ast.Constant() | ast.BoolOp() | ast.Compare():
                    continue
                case ast.Attribute(attr=attr) if attr != "training":
                    continue
                case (
                    ast.UnaryOp(op=ast.Not()) | ast.boolop() | ast.cmpop() | ast.Not() | ast.Load()
                ):
                    continue
            return None
        return ast.unparse(test)

    def _keep_name(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                path = self._path(value)
            case (
                ast.For(target=ast.Name(id=name), iter=value)
                | ast.comprehension(target=ast.Name(id=name), iter=value)
            ):
                path = self._path(value)
                path = None if path is None else (*path, "*")
            case _:
                return
        if path:
            self.names.setdefault(name, path)

    def _path(self, node: ast.AST) -> _Path | None:
        match node:
            case ast.Name(id=name):
                return self.names.get(name)
            case ast.Attribute(value=value, attr=part):
                path = self._path(value)
                return None if path is None else (*path, part)
            case ast.Subscript(value=value):
                path = self._path(value)
                return None if path is None else (*path, "*")
        return None


class _Filled(ast.NodeTransformer):
    """Replaces some names by None, and others by `self`."""

    def __init__(self, absent: set[str], self_names: set[str]) -> None:
        self.absent, self.self_names = absent, self_names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.absent:
            return ast.Constant(None)
        return ast.Name("self", ast.Load()) if node.id in self.self_names else node


def _none_by_default(definition: ast.FunctionDef) -> set[str]:
    """The arguments whose default is None and which the method does not assign."""
    arguments = definition.args
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = list(
        zip(named[len(named) - len(arguments.defaults) :], arguments.defaults, strict=True)
    )
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d]
    absent = {a.arg for a, d in pairs if isinstance(d, ast.Constant) and d.value is None}
    stored = (n for n in ast.walk(definition) if isinstance(n, ast.Name))
    return absent - {n.id for n in stored if isinstance(n.ctx, ast.Store)}


def _asked_about(node: ast.AST) -> ast.AST | None:
    """The part of an expression whose values the expression does not use."""
    match node:
        case ast.Attribute(value=value, attr=attr) if attr in _ABOUT:
            return value
        case ast.Call(func=ast.Name(id=asking), args=[first, *_]) if asking in _ASKING:
            return first
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()]):
            return left
    return None
