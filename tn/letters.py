"""Einsum equations, as text or as lists of labels, read into axis words: "ij,jk->ik" → Equation.

The grammar is the union of what torch, NumPy and opt_einsum read: spaces anywhere, any letter of any alphabet, `...` once a term, an
output that may be left out (labels that occur once, sorted), and lists of sortable labels instead of text.
"""

import functools
import itertools
import operator
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tn.errors import KindError, SizeError, SpecError
from tn.spec import Spec, Term

Labels = tuple[Hashable, ...]  # of one term, `...` among them

_BUILT_IN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Equation:
    """An einsum equation for operands of known ranks.

    Attributes:
        text: as a reader of a message knows it. terms: axis words of each operand's dimensions. output: axis words of the result.
        labels: (word, label) pairs, the label as written.
    """

    text: str
    terms: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]

    def label(self, word: str) -> str:
        """The label of an axis word, as written."""
        return dict(self.labels)[word]

    @property
    def letters(self) -> str:
        """The equation with one letter an axis and its output written out: letters as they were, free ones for dots and lists of labels.

        >>> read("...ij,...jk", (3, 2)).letters
        'aij,jk->aik'
        """
        own = {word: label for word, label in self.labels if len(label) == 1 and not word.startswith("axis_")}
        free = (letter for number in itertools.count() if (letter := symbol(number)) not in own.values())
        names = {word: own.get(word) or next(free) for word, _ in self.labels}
        *left, right = ("".join(names[word] for word in term) for term in (*self.terms, self.output))
        return f"{','.join(left)}->{right}"

    def bind(self, shapes: Sequence[Sequence[int]]) -> tuple[dict[str, int], tuple[tuple[int, ...], ...]]:
        """Sizes of the axes, and for each operand the dimensions of size one that broadcast against a larger one.

        Raises:
            SizeError: naming the operand, the label and both sizes.
        """
        sizes: dict[str, int] = {}
        for i, (term, shape) in enumerate(zip(self.terms, shapes, strict=True)):
            own: dict[str, int] = {}
            for word, size in zip(term, shape, strict=True):
                if own.setdefault(word, size) != size:
                    raise SizeError(f"equation {self.text!r}: operand {i} has sizes {own[word]} and {size} for {self.label(word)!r}")
            for word, size in own.items():
                known = sizes.setdefault(word, size)
                if known != size and known != 1 and size != 1:
                    raise SizeError(f"equation {self.text!r}: operand {i} has size {size} for {self.label(word)!r}, another has {known}")
                if known == 1:
                    sizes[word] = size
        narrow = tuple(
            tuple(d for d, (word, size) in enumerate(zip(term, shape, strict=True)) if size == 1 and sizes[word] != 1)
            for term, shape in zip(self.terms, shapes, strict=True)
        )
        return sizes, narrow

    def spec(self, narrow: Sequence[Sequence[int]]) -> Spec:
        """As a spec with operands t0, t1, …, without the dimensions that broadcast."""
        kept = [tuple((word,) for d, word in enumerate(term) if d not in drop) for term, drop in zip(self.terms, narrow, strict=True)]
        operands = tuple(Term(f"t{i}", dims) for i, dims in enumerate(kept))
        return Spec(operands, (Term("y0", tuple((word,) for word in self.output)),))


@functools.lru_cache(maxsize=4096)
def read(text: str, ranks: tuple[int, ...]) -> Equation:
    """Read the text of an equation for operands of the given ranks.

    Raises:
        SpecError: naming the operand and what was expected.

    >>> read("...ij,...jk->...ik", (3, 2)).terms
    (('dot0', 'i', 'j'), ('j', 'k'))
    """
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = [_letters(term, text, f"operand {i}") for i, term in enumerate(left.split(","))]
    return _equation(text, terms, _letters(right, text, "the output") if arrow else None, ranks)


def read_lists(lists: Sequence[Sequence[Hashable]], output: Sequence[Hashable] | None, ranks: tuple[int, ...]) -> Equation:
    """Read lists of labels (integers, or anything hashable and sortable; `...` for the leading dimensions), one an operand.

    Raises:
        KindError: a list that is none, or labels that cannot be sorted. SpecError: as in `read`.

    >>> read_lists([[0, 1], [1, 2]], None, (2, 2)).output
    ('axis_0', 'axis_2')
    """
    terms = [_plain(labels, f"operand {i}") for i, labels in enumerate(lists)]
    return _equation(None, terms, None if output is None else _plain(output, "the output"), ranks)


def symbol(number: int) -> str:
    """A letter for each number: the 52 that everybody reads, then others.

    >>> symbol(0), symbol(51), symbol(52)
    ('a', 'Z', 'À')
    """
    if number < len(_BUILT_IN):
        return _BUILT_IN[number]
    code = number + 140  # as opt_einsum counts, from U+00C0, so that its reports and ours agree
    return chr(code if code < 0xD800 else code + 0x800)  # no surrogates


def spell(terms: Sequence[Sequence[str]], output: Sequence[str]) -> str:
    """An equation in letters for terms in words.

    >>> spell([("row", "inner"), ("inner", "column")], ("row", "column"))
    'ab,bc->ac'
    """
    letters = {word: symbol(i) for i, word in enumerate(dict.fromkeys(word for term in (*terms, output) for word in term))}
    left, right = (["".join(letters[word] for word in term) for term in side] for side in (terms, [output]))
    return f"{','.join(left)}->{right[0]}"


def _letters(term: str, text: str, where: str) -> Labels:
    """The letters of a term, `...` as one label."""
    before, dots, after = term.partition("...")
    for letter in before + after:
        if not letter.isalpha() and letter.isascii():  # × and ÷ are letters to opt_einsum, whose symbols run through them
            raise SpecError(f"equation {text!r}: cannot read {letter!r} in {where}; expected letters, '...' once and one '->'")
    return (*before, *([...] if dots else []), *after)


def _plain(labels: Sequence[Hashable], where: str) -> Labels:
    if isinstance(labels, str | bytes) or not hasattr(labels, "__iter__"):
        raise KindError(f"{where} has the labels {labels!r}, expected a list such as [0, 1] or [..., 0]")
    try:
        return tuple(operator.index(label) if hasattr(label, "__index__") else label for label in labels)
    except TypeError:  # tensors and arrays say that they have an index, and most have none
        raise KindError(f"{where} has a {type(labels).__name__} for labels, expected a list such as [0, 1]; an equation is text") from None


def _equation(text: str | None, terms: Sequence[Labels], output: Labels | None, ranks: tuple[int, ...]) -> Equation:
    shown = text if text is not None else _show(terms, output)
    if len(terms) != len(ranks):
        raise SpecError(f"equation {shown!r} has {len(terms)} terms for {len(ranks)} operands")
    words = _words(terms, output, is_text=text is not None)
    hidden = [_hidden(term, rank, shown, i) for i, (term, rank) in enumerate(zip(terms, ranks, strict=True))]
    width = max(hidden)
    spread = tuple(_spread(term, count, words) for term, count in zip(terms, hidden, strict=True))
    if output is None:
        flat = [label for term in terms for label in term if label is not ...]
        once = [label for label in words if flat.count(label) == 1]
        result = (*_dots(width), *(words[label] for label in once))
    else:
        _check_output(terms, output, shown)
        result = _spread(output, width, words)
    labels = {word: str(label) for label, word in words.items()} | dict.fromkeys(_dots(width), "...")
    return Equation(shown, spread, result, tuple(labels.items()))


def _words(terms: Sequence[Labels], output: Labels | None, is_text: bool) -> dict[Hashable, str]:
    """label → axis word, the labels sorted."""
    found = {label for term in (*terms, output or ()) for label in term if label is not ...}
    try:
        ordered = sorted(found)  # type: ignore[type-var]  # that they can be sorted is what is tried
    except TypeError:
        raise KindError(f"labels {sorted(map(repr, found))} cannot be sorted; take labels of one kind, such as integers") from None
    return {label: _word(label) if is_text else f"axis_{i}" for i, label in enumerate(ordered)}


def _word(letter: Hashable) -> str:
    """The letter itself where Python takes it as a name of its own."""
    text = str(letter)
    return text if text.isidentifier() and unicodedata.normalize("NFKC", text) == text else f"letter_{ord(text)}"


def _hidden(term: Labels, rank: int, shown: str, operand: int) -> int:
    """How many dimensions the ellipsis of a term stands for."""
    if term.count(...) > 1:
        raise SpecError(f"equation {shown!r}: operand {operand} has '...' twice")
    named = len(term) - term.count(...)
    if rank < named or (rank > named and ... not in term):
        dims = "1 dimension" if rank == 1 else f"{rank} dimensions"
        raise SpecError(f"equation {shown!r}: operand {operand} has {dims}, its term {_join(term)!r} names {named}")
    return rank - named


def _check_output(terms: Sequence[Labels], output: Labels, shown: str) -> None:
    known = {label for term in terms for label in term}
    for label in output:
        if output.count(label) > 1:
            raise SpecError(f"equation {shown!r}: output {_join((label,))!r} is repeated")
        if label is not ... and label not in known:
            raise SpecError(f"equation {shown!r}: output {label!r} is on no operand")


def _spread(term: Labels, hidden: int, words: dict[Hashable, str]) -> tuple[str, ...]:
    """A term in words, its ellipsis written out as axes counted from the right."""
    return tuple(word for label in term for word in (_dots(hidden) if label is ... else (words[label],)))


def _dots(count: int) -> tuple[str, ...]:
    return tuple(f"dot{i}" for i in range(count - 1, -1, -1))


def _show(terms: Sequence[Labels], output: Labels | None) -> str:
    """Lists of labels as a message shows them."""
    text = ", ".join(f"[{_join(term, ' ')}]" for term in terms)
    return text if output is None else f"{text} -> [{_join(output, ' ')}]"


def _join(term: Labels, between: str = "") -> str:
    return between.join("..." if label is ... else str(label) for label in term)
