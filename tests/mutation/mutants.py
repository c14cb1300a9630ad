"""Mutants of a module's source: one sign, comparison, constant or mask changed in each."""

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult, ast.Mod: ast.Mult},
}
TURNED: dict[type[ast.AST], type[ast.AST]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
NAMES = {"maximum": "minimum", "max": "min", "expm1": "exp", "sum": "mean", "any": "all", "sub_": "add_"}
NAMES |= {new: old for old, new in NAMES.items()} | {"exp": "expm1", "argmax": "argmin", "mean": "sum"}
SHOWN = 100  # characters of the changed expression in a mutant's name


def mutants(source: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yields every mutant's name, which says where and what without line numbers, and what makes its source."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    for path in _paths(tree, []):
        node = path[-1]
        for variant in _variants(node, path[-2] if len(path) > 1 else None):
            name = _name(path, variant)
            seen[name] += 1
            if seen[name] > 1:
                name += f" #{seen[name]}"
            yield name, partial(_source, tree, path, variant)


def _paths(node: ast.AST, above: list[ast.AST]) -> Iterator[list[ast.AST]]:
    """Every node with its ancestors, but not messages, annotations, docstrings and decorators."""
    path = [*above, node]
    yield path
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            alias = isinstance(child, ast.Assign) and isinstance(child.value, ast.Subscript) and not above
            if isinstance(child, ast.AST) and not docstring and not alias:
                yield from _paths(child, path)


def _variants(node: ast.AST, parent: ast.AST | None) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            if type(op) in SWAPS:
                yield _with(node, "op", SWAPS[type(op)]())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for new in (table[type(op)] for table in (SWAPS, TURNED) if type(op) in table):
                    yield _with(node, "ops", [*ops[:i], new(), *ops[i + 1 :]])
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Name(id=name, ctx=ast.Load()) if "mask" in name or name == "present":
            called = isinstance(parent, ast.Call) and parent.func is node
            if not called and not (isinstance(parent, ast.Attribute) and parent.attr in ("dtype", "shape", "device")):
                yield ast.UnaryOp(ast.Invert(), node)
                yield ast.Call(ast.parse("torch.ones_like", mode="eval").body, [node], [])
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, yes, no]):
            yield ast.Call(node.func, [condition, no, yes], [])
        case ast.Call(func=ast.Attribute(value=value, attr="detach"), args=[]):
            yield value
        case ast.Attribute(value=value, attr=attr) if attr in NAMES and isinstance(parent, ast.Call):
            yield ast.Attribute(value, NAMES[attr], ast.Load())
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES and isinstance(parent, ast.Call):
            yield ast.Name(NAMES[name], ast.Load())
        case ast.keyword(arg="min" | "max" as arg, value=value):
            yield ast.keyword("max" if arg == "min" else "min", value)


def _with(node: ast.AST, field: str, value: object) -> ast.AST:
    new = copy.copy(node)
    setattr(new, field, value)
    return new


def _source(tree: ast.AST, path: list[ast.AST], variant: ast.AST) -> str:
    return ast.unparse(_replaced(tree, path, variant))


def _replaced(tree: ast.AST, path: list[ast.AST], variant: ast.AST) -> ast.AST:
    """A copy of the tree in which the node at the end of `path` is `variant`."""
    memo = {id(path[-1]): copy.deepcopy(variant)}
    return ast.fix_missing_locations(copy.deepcopy(tree, memo))


def _name(path: list[ast.AST], variant: ast.AST) -> str:
    where = [n.name for n in path if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    shown = path[-1]
    for node in reversed(path):  # as much around it as is still short
        if isinstance(node, ast.keyword | ast.arg):
            continue
        if (hasattr(node, "body") and not isinstance(node, ast.expr)) or len(ast.unparse(node)) > SHOWN:
            break
        shown = node
    old = ast.unparse(shown)
    new = ast.unparse(_replaced(shown, path, variant))
    return f"{'.'.join(where)}: {old} -> {new}".replace("\n", " ")
