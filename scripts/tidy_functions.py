# SPDX-License-Identifier: Apache-2.0
"""Functions in a source file, with their lengths: Python by its syntax tree, the rest by layout.

The lines of a docstring do not count: a contract may be as long as it must.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

CYTHON_FUNCTION = re.compile(
    r"(?P<indent>[ \t]*)(?:async +)?(?:def|cpdef|cdef)\b(?! *class\b)[^#=]*?(?P<name>\w+)\("
)
C_FUNCTION = re.compile(r"[A-Za-z_][^;=]*?(?P<name>\w+)\(")


class Function(NamedTuple):
    """One function: its name, its first line from 1, and its number of lines less the docstring."""

    name: str
    line: int
    length: int


def python_functions(text: str) -> Iterator[Function]:
    """Find the functions of a Python file or stub, nested ones and methods included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _node_lines(node)
            if ast.get_docstring(node) is not None:
                length -= _node_lines(node.body[0])
            yield Function(node.name, node.lineno, length)


def _node_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _signature_end(lines: list[str], start: int) -> int:
    """Return the index of the line on which the parenthesis opened at ``start`` is closed."""
    depth = 0
    for index in range(start, len(lines)):
        code = lines[index].split("#", 1)[0]
        depth += code.count("(") - code.count(")")
        if depth <= 0:
            return index
    return len(lines) - 1


def cython_functions(text: str) -> Iterator[Function]:
    """Find the functions of a Cython file: a signature that ends in a colon, and what is indented.

    A declaration without a body, as in a .pxd, is no function.
    """
    lines = text.splitlines()
    for start, line in enumerate(lines):
        match = CYTHON_FUNCTION.match(line)
        if match is None:
            continue
        end = _signature_end(lines, start)
        if not lines[end].split("#", 1)[0].rstrip().endswith(":"):
            continue
        indent = len(match["indent"].expandtabs())
        last = end
        for index in range(end + 1, len(lines)):
            body = lines[index].expandtabs()
            if body.strip():
                if len(body) - len(body.lstrip()) <= indent:
                    break
                last = index
        length = last - start + 1 - _docstring_lines(lines, end + 1)
        yield Function(match["name"], start + 1, length)


def _docstring_lines(lines: list[str], start: int) -> int:
    """Return the number of lines of the docstring that begins at ``start``, 0 if none does."""
    if not lines[start:] or not lines[start].lstrip().startswith(('"""', 'r"""')):
        return 0
    if lines[start].count('"""') > 1:
        return 1
    ends = (index for index in range(start + 1, len(lines)) if '"""' in lines[index])
    return next(ends, start) - start + 1


def c_functions(text: str) -> Iterator[Function]:
    """Find the functions of a C file or header.

    They begin in the first column and end with a closing brace in the first column.
    """
    lines = text.splitlines()
    start: int | None = None
    name = ""
    inside = False
    for index, line in enumerate(lines):
        if not inside:
            match = C_FUNCTION.match(line)
            if match is not None and start is None:
                start, name = index, match["name"]
            if start is not None and line.rstrip().endswith("{"):
                inside = True
            elif start is not None and (";" in line or "}" in line or not line.strip()):
                start = None  # a declaration, a macro call or a function on one line
        elif line.startswith("}"):
            assert start is not None
            yield Function(name, start + 1, index - start + 1)
            start, inside = None, False


def functions(path: str, text: str) -> Iterator[Function]:
    """Find the functions of a file by the ending of its name; none in other kinds of files."""
    if path.endswith((".py", ".pyi")):
        yield from python_functions(text)
    elif path.endswith((".pyx", ".pxd")):
        yield from cython_functions(text)
    elif path.endswith((".c", ".h")):
        yield from c_functions(text)
