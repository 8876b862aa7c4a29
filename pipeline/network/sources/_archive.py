"""`torch.export` archives, reduced to what is data before torch reads them.

`torch.export.load` of torch 2.14 unpickles (weights marked so, custom objects, example inputs, with a silent
second try without `weights_only`), loads compiled libraries, evaluates the guards that an archive lists as
Python source, hands its shape expressions to `sympify`, which evaluates them, and looks operators up by name
anywhere in torch. So an archive is copied member by member first: tensors in raw bytes and the graph
are kept if every operator and expression in it is one of those known to be harmless; example inputs and
guards are left out; anything else is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_RAW = re.compile(
    r"data/(weights/weight|constants/tensor)_\d+|byteorder|archive_(format|version)|\.data/(serialization_id|version)"
)
_PAYLOADS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_GRAPH = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.\w+\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(int|float|max|min|not|sqrt|ite|sum)"
)
_FUNCTION = re.compile(
    r"Symbol|Integer|Rational|Add|Mul|Pow|(Python)?Mod|(Floor|Clean|Ceil)Div|ModularIndexing|Max|Min|And|Or|Not"
    r"|Eq|Equality|Ne|Unequality|Ge|GreaterThan|Gt|StrictGreaterThan|Le|LessThan|Lt|StrictLessThan"
)
_SYMBOL = re.compile(r"[suz]\w*\d")
_SYNTAX = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
)


def reduced(path: Path) -> io.BytesIO:
    """The archive without anything that could run.

    Raises:
        UserError: no exported program, or one that holds more than tensors and known operators.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"model.name: {path} cannot be read: {error}. Give a file of torch.export.save."
        ) from None
    lacking = [name for name in (_GRAPH, *_PAYLOADS) if name not in members]
    if lacking:
        raise UserError(
            f"model.name: {path} has no {lacking[0]}. Give a file of torch.export.save, torch 2.9 or newer."
        )
    kept = {name: content for name, content in members.items() if _RAW.fullmatch(name)}
    for name in _PAYLOADS:
        _require_raw(path, json.loads(members[name]))
        kept[name] = members[name]
    graph = json.loads(members[_GRAPH])
    _require_harmless(path, graph)
    kept[_GRAPH] = json.dumps(graph | {"guards_code": []}).encode()
    kept[_INPUTS] = b""
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in kept.items():
            archive.writestr(f"model/{name}", content)
    copy.seek(0)
    return copy


def _require_raw(path: Path, payloads: dict[str, Any]) -> None:
    for name, payload in payloads["config"].items():
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise UserError(
                f"model.name: {path} holds {name!r} as a pickled object, and nothing in it was run. "
                "Export a model that is made of plain tensors."
            )


def _require_harmless(path: Path, graph: Any) -> None:
    for key, value in _entries(graph):
        if key == "target" and not _OPERATOR.fullmatch(value):
            raise UserError(
                f"model.name: {path} calls {value!r}, which is no known operator, and nothing in it was run. "
                "Export a model that uses torch's and torchvision's operators only."
            )
        if key == "expr_str" and not _is_arithmetic(value):
            raise UserError(
                f"model.name: {path} has the size {value!r}, which is no arithmetic; nothing was run."
            )


def _entries(value: Any) -> Iterator[tuple[str, str]]:
    """All texts in nested JSON with their keys."""
    if isinstance(value, list):
        for item in value:
            yield from _entries(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield key, item
            else:
                yield from _entries(item)


def _is_arithmetic(expression: str) -> bool:
    """Whether a size is made of numbers, symbols and known functions alone."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(isinstance(node, _SYNTAX) for node in ast.walk(tree)) and _is_harmless(tree.body)


def _is_harmless(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.Name):
        return _SYMBOL.fullmatch(node.id) is not None
    if not isinstance(node, ast.Call):
        return all(_is_harmless(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))
    if not isinstance(node.func, ast.Name) or not _FUNCTION.fullmatch(node.func.id):
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    if node.func.id == "Symbol":
        name, *given = given or [ast.Constant("")]
        if not (isinstance(name, ast.Constant) and str(name.value).isidentifier()):
            return False
    return all(map(_is_harmless, given))
