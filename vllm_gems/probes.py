"""What a callable or an op looks like from outside, as short strings that can be compared.

Each string comes about in two ways: from the live object, in the process that is about to patch it, and from the
syntax tree or the binary of a release that is not installed. Both must give the same string, or a recorded release
would pass a probe that the live one fails; hence both ways live here, and nothing outside the standard library does.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

# Stands for a default that only running the module could evaluate, such as an enum member or a dtype.
_OPAQUE = "..."
_ARITHMETIC = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)


class _Verbatim:
    """A default whose repr is the given text, because `inspect.Signature` prints defaults by repr."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _literal(text: str) -> str:
    """`text` as repr prints it if it is a literal; otherwise `_OPAQUE`."""
    try:
        return repr(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return _OPAQUE


def signature_of(function: Callable[..., Any]) -> str:
    """Parameter names and defaults of a live callable; annotations come and go between releases and mean nothing.

    A default whose repr is no literal reads "...". The syntax tree cannot tell that `x=LIMIT` is a number, so such a
    function does not compare; none that a seam names has one.
    """
    signature = inspect.signature(function)
    bare = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty:
            default = _Verbatim(_literal(repr(default)))
        bare.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def signature_from_ast(node: FunctionNode) -> str:
    """What `signature_of` says of the function that `node` defines, reached as an attribute of its module or class."""
    arguments = copy.deepcopy(node.args)
    if "classmethod" in decorators_of(node):
        del (arguments.posonlyargs or arguments.args)[0]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [_literal_node(default) for default in arguments.defaults]
    arguments.kw_defaults = [default and _literal_node(default) for default in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


def _literal_node(default: ast.expr) -> ast.expr:
    """`default` as the live function's repr shows it, arithmetic such as `4096 * 32` carried out."""
    text = ast.unparse(default)
    if all(isinstance(node, _ARITHMETIC) for node in ast.walk(default)):
        text = repr(eval(text))
    return ast.Name(_literal(text))


def decorators_of(node: FunctionNode) -> frozenset[str]:
    """The last component of each decorator's name: `functools.lru_cache(maxsize=1)` is "lru_cache"."""
    calls = (item.func if isinstance(item, ast.Call) else item for item in node.decorator_list)
    return frozenset(ast.unparse(call).rpartition(".")[2] for call in calls)


def hash_of(function: Callable[..., Any]) -> str:
    """A hash of what a live function does; OSError or TypeError if it has no source, or is not made by `def`."""
    if getattr(inspect.unwrap(function), "__name__", "") == "<lambda>":
        raise TypeError("a lambda shares its lines with other code")
    source = inspect.getsource(function)
    if source[:1].isspace():  # a method: dedenting would also change its string literals of several lines
        source = "if True:\n" + source
    node = ast.parse(source).body[0]
    if isinstance(node, ast.If):
        node = node.body[0]
    if not isinstance(node, FunctionNode):
        raise TypeError(f"{function!r} is not made by a def statement")
    return hash_from_ast(node)


def hash_from_ast(node: FunctionNode) -> str:
    """What `hash_of` says of the function that `node` defines: comments, layout and docstring do not count.

    `ast.unparse` itself changes between Python releases (parentheses around tuples until 3.10, quotes inside f-strings
    until 3.11), so a hash recorded under another one may differ: a replacement is then refused, never wrongly accepted.
    """
    bare = copy.copy(node)
    if ast.get_docstring(node, clean=False) is not None:
        bare.body = node.body[1:]
    return hashlib.sha256(ast.unparse(bare).encode()).hexdigest()[:16]


# "Tensor(a!)" and, as the dispatcher prints the schemas of stable-ABI libraries, "Tensor($0! -> )" and "int($1! -> )?".
_ALIAS = re.compile(r"(?<=\w)\(([^()]*)\)")
_ARGUMENT = re.compile(r"(?P<type>\(.*?\)\S*|\S+?)(?:\s+\w+)?\s*(?:=\s*(?P<default>.*))?")
_CONSTANTS = {"true": "True", "false": "False", "none": "None"}


def normalise_schema(schema: str) -> str:
    """An op's schema without its name, parameter names and alias letters: what a caller by position depends on."""
    bare = " ".join(schema.split())
    bare = bare[bare.index("(") :].replace(" !", "! ")  # some of vLLM's own say "Tensor !out"
    bare = _ALIAS.sub(lambda alias: "!" if "!" in alias[1] else "", re.sub(r"\bSymInt\b", "int", bare))
    arguments, _, returns = bare.rpartition("->")
    arguments = arguments.strip()
    returns = returns.strip()
    if not returns.startswith("("):
        returns = f"({returns})"
    results = [_argument(item) for item in _split(returns[1:-1])]
    result = results[0] if len(results) == 1 else f"({', '.join(results)})"
    return f"({', '.join(_argument(item) for item in _split(arguments[1:-1]))}) -> {result}"


def _split(text: str) -> Iterator[str]:
    """The items of a list at its commas, those inside brackets and quotes left alone."""
    for item in re.findall(r"(?:\([^()]*\)|\[[^\[\]]*\]|\"[^\"]*\"|'[^']*'|[^,])+", text):
        yield item.strip()


def _argument(text: str) -> str:
    """The type of one argument and its default, e.g. "int=0"."""
    match = _ARGUMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"not an argument of an op schema: {text!r}")
    kind = match["type"].replace(" ", "")
    return kind if match["default"] is None else f"{kind}={_default(kind, match['default'].strip())}"


def _default(kind: str, text: str) -> str:
    """A default in Python's spelling: binaries say `false` and `7.`, the dispatcher says `False` and `7.0`."""
    text = _CONSTANTS.get(text, text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # an enumerator such as `contiguous_format`
        return text
    return repr(float(value)) if kind.startswith("float") and isinstance(value, int) else repr(value)
