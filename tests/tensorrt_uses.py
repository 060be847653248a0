"""What our source uses of TensorRT, found by following types through it, and what of that an API does not have.

A type is known of the module itself (`trt`, or `.api` of a library), of parameters and variables that are annotated
with one of its classes, and of whatever a call or an attribute of such a value gives. Types are told as "module",
"class X", "X" for an instance, "method X.m" and "list of X"; None is anything else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from tests.tensorrt_api import Api, Signature

PLAIN = {"None", "bool", "int", "str", "float", "object", "tuple", "bytes", "capsule"}


class Uses(ast.NodeVisitor):
    """`found` are uses as "Class.member", `wrong` those that the API does not have, with their lines."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, str | None] = {}
        self.found: set[str] = set()
        self.wrong: list[str] = []

    def read(self, source: str) -> None:
        """Add what one file uses."""
        tree = ast.parse(source)
        self._known = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                self._known[f"{node.name}()"] = self._annotated(node.returns)
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self._known)
        for given in (*node.args.args, *node.args.kwonlyargs):
            self._known[given.arg] = self._annotated(given.annotation)
        self.generic_visit(node)
        attributes = {name: kind for name, kind in self._known.items() if name.startswith("self.")}
        self._known = outer | attributes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in map(self.type_of, node.bases):
            if base is not None and base.startswith("class "):
                self._check_overrides(base.removeprefix("class "), node)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        kind = self.type_of(node.value)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=True):
                    self._bind(part, self.type_of(value))
            else:
                self._bind(target, kind)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        kind = self.type_of(node.value) if node.value is not None else None
        self._bind(node.target, self._annotated(node.annotation) or kind)

    def visit_Expr(self, node: ast.Expr) -> None:
        self.type_of(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.type_of(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.type_of(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self.type_of(node)

    def type_of(self, node: ast.expr) -> str | None:
        """The type of an expression; whatever is used on the way is noted."""
        if isinstance(node, ast.Name):
            return "module" if node.id == "trt" else self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            for loop in node.generators:
                kind = self.type_of(loop.iter)
                self._bind(loop.target, kind.removeprefix("list of ") if kind else None)
                for test in loop.ifs:
                    self.type_of(test)
            return f"list of {kind}" if (kind := self.type_of(node.elt)) else None
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.type_of(child)
        return None

    def _attribute(self, node: ast.Attribute) -> str | None:
        owner = self.type_of(node.value)
        if owner is None:
            if node.attr == "api":
                return "module"
            return self._known.get(f"self.{node.attr}") if ast.unparse(node.value) == "self" else None
        if owner == "module":
            return self._class(node, node.attr)
        name = owner.removeprefix("class ")
        if f"{name}.{node.attr}" in self._api.classes:
            return self._class(node, f"{name}.{node.attr}")
        member = self._api.classes.get(name, {}).get(node.attr)
        self.found.add(f"{name}.{node.attr}")
        if member is None:
            self._complain(node, f"{name} has no {node.attr}")
            return None
        if member.kind == "method":
            return f"method {name}.{node.attr}"
        if member.kind == "property" and not owner.startswith("class "):
            return self._given(node, {one.returns for one in member.signatures})
        return name if owner.startswith("class ") and node.attr != "__members__" else None

    def _class(self, node: ast.expr, name: str) -> str | None:
        self.found.add(name)
        if name not in self._api.classes:
            self._complain(node, f"there is no {name}")
            return None
        return f"class {name}"

    def _call(self, node: ast.Call) -> str | None:
        made = self.type_of(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.type_of(argument)
        if made is None:
            return self._known.get(f"{node.func.id}()") if isinstance(node.func, ast.Name) else None
        kind, _, name = made.partition(" ")
        if kind == "class":
            self._check(node, f"{name}.__init__", self._api.classes[name]["__init__"].signatures)
            return name
        owner, _, method = name.rpartition(".")
        signatures = self._api.classes[owner][method].signatures
        self._check(node, name, signatures)
        return None if method.startswith("__") else self._given(node, {one.returns for one in signatures})

    def _check(self, node: ast.Call, name: str, signatures: Iterable[Signature]) -> None:
        told = list(signatures)
        named = {keyword.arg for keyword in node.keywords}
        count = len(node.args) - name.endswith("__init__") * _passes_self(node)
        if told and not any(_takes(one, count, named) for one in told):
            self._complain(node, f"{name} does not take {count} arguments and {sorted(map(str, named))}")

    def _check_overrides(self, base: str, node: ast.ClassDef) -> None:
        for method in (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name != "__init__"):
            member = self._api.classes[base].get(method.name)
            self.found.add(f"{base}.{method.name}")
            if member is None:
                self._complain(method, f"{base} has no {method.name} to override")
            elif not any(len(one.parameters) == len(method.args.args) - 1 for one in member.signatures):
                self._complain(method, f"{base}.{method.name} is not called with {len(method.args.args) - 1} arguments")

    def _given(self, node: ast.AST, returned: set[str]) -> str | None:
        """The one class among what may be returned; a class that is not known would end the search unnoticed."""
        for name in returned - PLAIN:
            known = next((own for own in (name, name.removeprefix("I")) if own in self._api.classes), None)
            if known is None and not name.endswith("]"):
                self._complain(node, f"{name} is returned, which is not known")
            return known
        return None

    def _annotated(self, node: ast.expr | None) -> str | None:
        kind = self.type_of(node) if isinstance(node, ast.Attribute) else None
        return kind.removeprefix("class ") if kind and kind.startswith("class ") else None

    def _bind(self, target: ast.expr, kind: str | None) -> None:
        if isinstance(target, ast.Name):
            self._known[target.id] = kind
        elif isinstance(target, ast.Attribute):
            if ast.unparse(target.value) == "self":
                self._known[f"self.{target.attr}"] = kind
            else:
                self.type_of(target)
        else:
            for child in ast.iter_child_nodes(target):
                if isinstance(child, ast.expr):
                    self._bind(child, None)

    def _complain(self, node: ast.AST, what: str) -> None:
        self.wrong.append(f"line {getattr(node, 'lineno', '?')}: {what}")


def uses_of(api: Api, *sources: str | Path) -> Uses:
    """What source texts, or files, use of `api`."""
    uses = Uses(api)
    for source in sources:
        uses.read(source.read_text() if isinstance(source, Path) else source)
    return uses


def _passes_self(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr == "__init__"


def _takes(one: Signature, count: int, named: set[str | None]) -> bool:
    positional = one.parameters[:count]
    needed = set(one.parameters) - set(one.optional) - set(positional)
    return count <= len(one.parameters) and named <= set(one.parameters[count:]) and needed <= named
