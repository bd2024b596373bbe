"""The text of a contraction, read into values: "x: ... (i j), a: i j r -> ... r" → Spec.

Grammar (DESIGN, "Spec grammar"): operands separated by commas, `->` required; `name:` optional; axes are words separated by
spaces; `(i j)` is one stored dimension holding several axes, the first slowest; `1` is a stored dimension of size one; `...`
once per tensor, first, stands for the leading dynamic dimensions.
"""

import functools
import re
from dataclasses import dataclass

from tn.errors import SpecError

ROWS = "..."  # the axis that all leading dynamic dimensions together make

_TOKEN = re.compile(r"\s*(\.\.\.|->|[A-Za-z_]\w*|[0-9]+|[(),:]|\S)")


@dataclass(frozen=True, slots=True)
class Term:
    """One tensor of a spec: its name and, for each stored dimension, the axes that dimension holds (none for a `1`)."""

    name: str
    dims: tuple[tuple[str, ...], ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis in stored order, `...` as one axis."""
        return tuple(axis for dim in self.dims for axis in dim)

    def __str__(self) -> str:
        return f"{self.name}: {self.pattern}".rstrip()

    @property
    def pattern(self) -> str:
        """The dimensions alone, in spec grammar."""
        return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed spec: operands in order (a name may repeat: one tensor used twice) and one or more outputs."""

    operands: tuple[Term, ...]
    outputs: tuple[Term, ...]

    def __str__(self) -> str:
        alone = len(self.outputs) == 1 and self.outputs[0].name == "y0"
        outputs = ", ".join(t.pattern if alone else str(t) for t in self.outputs)
        return f"{', '.join(map(str, self.operands))} -> {outputs}".rstrip()


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Spec:
    """Read a spec.

    Args:
        text: such as "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)".

    Returns:
        The Spec; operands without a name are t0, t1, … by position, outputs y0, y1, ….

    Raises:
        SpecError: naming the place, what was expected, and `tn.einsum` when the text looks like single letters.

    >>> str(parse("x: ... i, i o -> ... o"))
    'x: ... i, t1: i o -> ... o'
    """
    if not isinstance(text, str):
        raise SpecError(f"a spec is a string such as 'x: ... i, w: i o -> ... o', got {type(text).__name__}")
    if text.count("->") != 1:
        hint = "" if "->" in text or " " in text.strip() else "; tn.einsum reads letters, whose output may be left out"
        raise SpecError(f"spec {text!r} has {text.count('->')} '->', expected one between the operands and the output{hint}")
    left, right = text.split("->")
    if "," in right and not all(part.strip() for part in _split(right)):
        raise SpecError(f"spec {text!r}: an output without name and axes; is there a comma too many behind '->'?")
    operands = tuple(_term(part, text, f"t{i}") for i, part in enumerate(_split(left)))
    outputs = tuple(_term(part, text, f"y{i}") for i, part in enumerate(_split(right)))
    spec = Spec(operands, outputs)
    _check(spec, text)
    return spec


def _split(side: str) -> list[str]:
    """The comma-separated terms of one side."""
    return side.split(",")


def _term(part: str, text: str, default: str) -> Term:
    name, colon, pattern = part.rpartition(":")
    name = name.strip()
    if colon and not name.isidentifier():
        raise SpecError(f"spec {text!r}: tensor name {name!r} is not a word")
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in _TOKEN.findall(pattern):
        if token == "(" and group is None:
            group = []
        elif token == ")" and group is not None:
            dims.append(tuple(group))
            group = None
        elif token == ROWS and group is None and not dims:
            dims.append((ROWS,))
        elif token == ROWS:
            raise SpecError(f"spec {text!r}: '...' in {part.strip()!r} must come first, once, and outside parentheses")
        elif token.isidentifier() and group is not None:
            group.append(token)
        elif token.isidentifier():
            dims.append((token,))
        elif token == "1":
            if group is None:
                dims.append(())
        else:
            raise SpecError(
                f"spec {text!r}: cannot read {token!r} in {part.strip()!r}; expected axis words, '1', '...' or '( )' around words"
            )
    if group is not None:
        raise SpecError(f"spec {text!r}: '(' without ')' in {part.strip()!r}")
    return Term(name or default, tuple(dims))


def _check(spec: Spec, text: str) -> None:
    patterns: dict[str, Term] = {}
    known = {axis for term in spec.operands for axis in term.axes}
    for term in spec.operands:
        first = patterns.setdefault(term.name, term)
        if len(first.dims) != len(term.dims):
            raise SpecError(
                f"spec {text!r}: tensor {term.name!r} has {len(first.dims)} dimensions in one place and {len(term.dims)} in another"
            )
    names = [term.name for term in spec.outputs]
    if len(set(names)) < len(names) or (len(names) > 1 and set(names) & set(patterns)):
        raise SpecError(f"spec {text!r}: output names {names} must differ from each other and from the operands")
    for term in spec.outputs:
        missing = [axis for axis in term.axes if axis not in known]
        if missing and looks_like_letters(spec):
            raise SpecError(
                f"spec {text!r} looks like single-letter einsum; specs here use axis words separated by spaces: call tn.einsum for letters"
            )
        if missing:
            raise SpecError(f"spec {text!r}: output axis {missing[0]!r} is on no operand; axes are {sorted(known)}")
        repeated = [axis for axis in term.axes if term.axes.count(axis) > 1]
        if repeated:
            raise SpecError(f"spec {text!r}: axis {repeated[0]!r} is repeated in the output; a diagonal can be read, not written")


def looks_like_letters(spec: Spec) -> bool:
    """Whether every term is at most one unnamed word, as in "ij,jk->ik" and "...ij,...jk->...ik"."""
    terms = [*spec.operands, *spec.outputs]
    words = [[dim for dim in term.dims if dim != (ROWS,)] for term in terms]
    return all(len(dims) <= 1 and len(dim) == 1 for dims in words for dim in dims) and all(
        term.name == f"t{i}" for i, term in enumerate(spec.operands)
    )
