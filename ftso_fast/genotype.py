"""Genotypes of DARTS cells: the value, its text and JSON forms, and their derivation from edge strengths.

States of a cell are numbered as DARTS numbers them: 0 and 1 are the two inputs, node n is state n + 2. Every
node keeps two edges `(operator, state)`; the cell's output concatenates the states in `*_concat`.
"""

from __future__ import annotations

import ast
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import UsageError

PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
              "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")  # fmt: skip
REPLACEMENTS = PRIMITIVES[1:]
N_INPUTS = 2
MAX_NODES, MAX_TEXT = 64, 64 * 1024
SCHEMA = "ftso.genotype/1"

# NASNet, AmoebaNet and PNAS use two operators more.
_KNOWN = (*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7")
_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_FORM = "Genotype(normal=[...], normal_concat=[...], reduce=[...], reduce_concat=[...])"
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)

Edge = tuple[str, int]
Pairs = Sequence[Sequence[Any]]


@dataclass(frozen=True, init=False, repr=False)
class Genotype:
    """A normal and a reduction cell; equal and hashed by value, however its sequences were written.

    Raises UsageError for an unknown operator, an edge that reads a later state, an odd number of edges, a
    concatenation that is empty, repeats a node or names none, and for more than 64 nodes. `repr` is DARTS
    source text. Source: the namedtuple of the same name and fields in DARTS (Liu et al., 2019).
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __init__(
        self, normal: Pairs, normal_concat: Sequence[int], reduce: Pairs, reduce_concat: Sequence[int]
    ) -> None:
        for cell, edges, concat in (("normal", normal, normal_concat), ("reduce", reduce, reduce_concat)):
            checked = _edges(cell, edges)
            object.__setattr__(self, cell, checked)
            object.__setattr__(self, f"{cell}_concat", _concat(f"{cell}_concat", concat, len(checked) // 2))

    @classmethod
    def from_topology(cls, normal: Pairs, reduce: Pairs, op: str) -> Genotype:
        """The genotype with `op` on every kept edge and all nodes concatenated (step 2a of FTSO).

        `normal` and `reduce` hold two states a node, as `derive_topology` returns them. Raises UsageError.
        """
        fields: list[Any] = []
        for cell, topology in (("normal", normal), ("reduce", reduce)):
            nodes = _sequence(f"topology of {cell}", topology, MAX_NODES)
            for n, states in enumerate(nodes):
                _sequence(f"topology of {cell}, node {n}", states, N_INPUTS, exactly=True)
            fields += [[(op, j) for states in nodes for j in states], range(N_INPUTS, N_INPUTS + len(nodes))]
        return cls(*fields)

    @classmethod
    def from_text(cls, text: str | bytes) -> Genotype:
        """Read the text that DARTS, PC-DARTS and P-DARTS publish: `NAME = Genotype(normal=[...], ...)`.

        Lists, tuples and `range`, keywords or positions, comments and line breaks are understood; nothing is
        evaluated. Raises UsageError for anything else and for more than 64 KiB.
        """
        source = re.sub(r"#[^\n]*", "", _decoded("genotype text", text)).strip()
        # Without operators, dots and backslashes a hostile text has little left to say to the parser.
        if stray := re.search(r"[^A-Za-z0-9_\s=,'\"()\[\]]", source):
            raise _wrong("genotype text", _FORM, f"the character {stray.group()!a}")
        try:
            body = ast.parse(source).body
        except _UNREADABLE as error:
            raise _wrong("genotype text", _FORM, f"unreadable text ({error})") from None
        match body:
            case [ast.Expr(ast.Call(ast.Name("Genotype")) as call)]:
                pass
            case [ast.Assign([ast.Name()], ast.Call(ast.Name("Genotype")) as call)]:
                pass
            case _:
                raise _wrong("genotype text", _FORM, "another statement or several")
        fields = [*zip(_FIELDS, call.args, strict=False), *((k.arg or "**", k.value) for k in call.keywords)]
        if len(call.args) > len(_FIELDS) or sorted(name for name, _ in fields) != sorted(_FIELDS):
            raise _wrong("genotype text", _FORM, f"the arguments {_short([name for name, _ in fields])}")
        return cls(**{name: _literal(node, depth=0) for name, node in fields})

    @classmethod
    def from_json(cls, text: str | bytes) -> Genotype:
        """Read the JSON document that `to_json` writes (schema `ftso.genotype/1`); raises UsageError."""
        source, expected = _decoded("genotype JSON", text), f"an object with schema {SCHEMA!r}"
        try:
            fields = json.loads(source)
        except _UNREADABLE as error:
            raise _wrong("genotype JSON", expected, f"unreadable text ({error})") from None
        if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
            raise _wrong("genotype JSON", expected, "another value")
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Genotype:
        """The genotype whose four fields `to_dict` gave; raises UsageError for missing or additional keys."""
        if not isinstance(fields, Mapping) or set(fields) != set(_FIELDS):
            raise _wrong("genotype object", f"the keys {', '.join(_FIELDS)}", _short(fields))
        return cls(**fields)

    @classmethod
    def read(cls, text: str | bytes) -> Genotype:
        """Read either dialect: JSON where the text begins with a brace, else DARTS source text."""
        source = _decoded("genotype", text).lstrip()
        return cls.from_json(source) if source.startswith("{") else cls.from_text(source)

    def nodes(self, cell: str) -> tuple[tuple[Edge, Edge], ...]:
        """The two edges of each node of the `"normal"` or the `"reduce"` cell; raises UsageError."""
        if cell not in ("normal", "reduce"):
            raise _wrong("cell", "'normal' or 'reduce'", _short(cell))
        edges = self.normal if cell == "normal" else self.reduce
        return tuple(zip(edges[::2], edges[1::2], strict=True))

    def to_dict(self) -> dict[str, list[Any]]:
        """The four fields as lists, edges as `[operator, state]`."""
        return {key: [list(x) if isinstance(x, tuple) else x for x in getattr(self, key)] for key in _FIELDS}

    def to_json(self) -> str:
        """One line of JSON that begins with the schema's name and version."""
        return json.dumps({"schema": SCHEMA, **self.to_dict()})

    def params(self, **network: Any) -> int:
        """Parameters of the network that is trained with this genotype, auxiliary head not counted unless asked for;
        keywords and UsageError as in `size.network_size`: channels=36, cells=20, classes=10, stem="cifar"."""
        from .size import network_size

        return network_size(self, **network)[0]

    def macs(self, **network: Any) -> int:
        """Multiply-adds of its convolutions and classifier for one image; keywords as for `params`, and size."""
        from .size import network_size

        return network_size(self, **network)[1]

    def __repr__(self) -> str:
        return f"Genotype({', '.join(f'{name}={list(getattr(self, name))}' for name in _FIELDS)})"

    def _repr_svg_(self) -> str:
        from .draw import draw_genotype

        return draw_genotype(self)

    def draw(self, path: str | PathLike[str], title: str | None = None) -> None:
        """Write the drawing of both cells to `path` as SVG; raises OSError where that cannot be written."""
        from .draw import draw_genotype

        Path(path).write_text(draw_genotype(self, title), encoding="utf-8", newline="\n")


def derive_topology(
    betas: Sequence[float], n_nodes: int = 4, ties: Sequence[float] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The two strongest predecessors of every node, stronger first, ties to the lower state (FTSO, Alg. 1).

    `betas` is one cell's flat vector: the first node's edges from (0, 1), the second's from (0, 1, 2), ...
    The softmax over a node's edges is monotone, so the raw values order them just as well. ties: another such vector,
    by which equal betas are ordered before the state decides.
    Raises UsageError for a wrong length and for values that are not finite, which have no order.
    """
    pairs = zip(_groups(betas, n_nodes), _groups(betas if ties is None else ties, n_nodes), strict=True)
    return tuple(tuple(sorted(range(len(b)), key=lambda j: (-b[j], -t[j]))[:2]) for b, t in pairs)


def margins(betas: Sequence[float], n_nodes: int = 4) -> tuple[float | None, ...]:
    """Per node the second largest raw beta minus the third, None for two inputs; errors as above."""
    ranked = [sorted(group, reverse=True) for group in _groups(betas, n_nodes)]
    return tuple(group[1] - group[2] if len(group) > N_INPUTS else None for group in ranked)


def _groups(betas: Sequence[float], n_nodes: int) -> list[list[float]]:
    if not isinstance(n_nodes, int) or not 1 <= n_nodes <= MAX_NODES:
        raise _wrong("n_nodes", f"an integer from 1 to {MAX_NODES}", _short(n_nodes))
    n_edges = sum(range(N_INPUTS, N_INPUTS + n_nodes))
    try:
        values, length = [float(beta) for beta in islice(betas, n_edges)], len(betas)
    except (TypeError, ValueError, OverflowError):
        raise _wrong("betas", f"{n_edges} numbers", _short(betas)) from None
    if length != n_edges:
        raise _wrong("betas", f"{n_edges} numbers for {n_nodes} nodes", f"{length}")
    for i, beta in enumerate(values):
        if not math.isfinite(beta):
            raise _wrong(f"betas[{i}]", "a finite number", f"{beta}")
    rest = iter(values)
    return [list(islice(rest, N_INPUTS + n)) for n in range(n_nodes)]


def _edges(cell: str, value: object) -> tuple[Edge, ...]:
    edges = _sequence(cell, value, 2 * MAX_NODES)
    if not edges or len(edges) % 2:
        raise _wrong(cell, "a positive even number of edges (two per node)", f"{len(edges)}")
    checked = []
    for i, edge in enumerate(edges):
        op, state = _sequence(f"{cell}[{i}]", edge, 2, exactly=True)
        if not isinstance(op, str) or op not in _KNOWN:
            raise _wrong(f"operator of {cell}[{i}]", f"one of {', '.join(_KNOWN)}", _short(op))
        checked.append((str(op), _state(f"input of node {i // 2} in {cell}[{i}]", state, 0, i // 2 + 1)))
    return tuple(checked)


def _concat(what: str, value: object, n_nodes: int) -> tuple[int, ...]:
    states = _sequence(what, value, MAX_NODES)
    checked = tuple(_state(f"entry of {what}", state, N_INPUTS, n_nodes + 1) for state in states)
    if not checked or len(set(checked)) != len(checked):
        raise _wrong(what, "one or more different nodes", _short(list(checked)))
    return checked


def _state(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise _wrong(what, f"a state from {low} to {high}", _short(value))
    return int(value)


def _sequence(what: str, value: object, limit: int, exactly: bool = False) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = tuple(islice(value, limit + 1))
        if len(items) == limit or (len(items) < limit and not exactly):
            return items
    raise _wrong(what, f"a list or tuple of {'' if exactly else 'at most '}{limit} entries", _short(value))


def _literal(node: ast.expr, depth: int) -> Any:
    match node:
        case ast.Constant(str() | int() as value) if not isinstance(value, bool):
            return value
        case ast.List(items) | ast.Tuple(items) if depth < 2:
            return [_literal(item, depth + 1) for item in items]
        case ast.Call(ast.Name("range"), [ast.Constant(int() as start), ast.Constant(int() as stop)], []):
            return range(start, stop)
    raise _wrong("genotype text", "strings, integers, lists, tuples and range(a, b)", type(node).__name__)


def _decoded(what: str, text: str | bytes) -> str:
    if not isinstance(text, str | bytes) or len(text) > MAX_TEXT:
        raise _wrong(what, f"a text of at most {MAX_TEXT} characters", _short(text))
    # Bytes that are not UTF-8 become a character that only a comment may hold.
    return (text.decode(errors="replace") if isinstance(text, bytes) else text).removeprefix("\ufeff")


def _wrong(what: str, expected: str, got: str) -> UsageError:
    return UsageError(f"{what}: expected {expected}, got {got}")


def _short(value: object) -> str:
    return " ".join(reprlib.repr(value).split())
