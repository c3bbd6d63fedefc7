"""Model string: the constructor call that checkpoints hold as text, parsed without running it.

Training code keeps the network's construction as a Python expression and evaluates it on loading.
Here it is parsed: a call of the one known class with keyword arguments that are literals.
"""

from __future__ import annotations

import ast
from math import inf

from engine.errors import ConfigError

MODEL_CLASS = "AsymmetricMASt3R"


def parse_model_string(text: str) -> dict[str, object]:
    """The keyword arguments of ``AsymmetricMASt3R(...)``: numbers, strings, flags, tuples.

    Raises:
        ConfigError: it is not such a call, or an argument is not a literal.
    """
    try:
        return _arguments_of(ast.parse(text.strip(), mode="eval").body, text=text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"expected a call of {MODEL_CLASS}(...), found {_short(text)}: {error}"
        ) from error


def _arguments_of(call: ast.expr, *, text: str) -> dict[str, object]:
    if not isinstance(call, ast.Call):
        raise ConfigError(f"expected a call of {MODEL_CLASS}(...), found {_short(text)}")
    if not isinstance(call.func, ast.Name) or call.func.id != MODEL_CLASS:
        raise ConfigError(
            f"expected a network of class {MODEL_CLASS}, found {_short(ast.unparse(call.func))}"
        )
    arguments: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is not None:
            arguments[keyword.arg] = _literal(keyword.value, of=keyword.arg)
    if call.args or len(arguments) < len(call.keywords):
        raise ConfigError(f"expected keyword arguments only, found {_short(text)}")
    return arguments


def _literal(node: ast.expr, *, of: str) -> object:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id="inf"):
            return inf
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _literal(operand, of=of)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(_literal(element, of=of) for element in elements)
    raise ConfigError(f"expected a literal for {of}, found {_short(ast.unparse(node))}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
