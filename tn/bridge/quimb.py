"""Networks with their tensors to quimb and back: names and roles travel as tags, axes as indices, hyperaxes as they are."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tn.bridge.cotengra import axis_words
from tn.errors import KindError, SpecError, unknown
from tn.network import Network, network
from tn.spec import ROWS, Spec, Term

_ROLE = "role:"  # tag of a tensor's role; everything else about a tag is the user's


@dataclass(frozen=True)
class FromQuimb:
    """What `tn.from_quimb` read. It unpacks into (network, tensors).

    Attributes:
        network: the contraction. tensors: data by tensor name, as quimb held it. tags: each tensor's tags in quimb's order.
    """

    network: Network
    tensors: Mapping[str, Any]
    tags: Mapping[str, tuple[str, ...]]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.tensors))


def to_quimb(net: Network, tensors: Mapping[str, Any] | Sequence[Any], tags: Mapping[str, Iterable[str]] | None = None) -> Any:
    """See `tn.Network.to_quimb`."""
    import quimb.tensor as qtn  # late: keeps `import tn` light

    if not isinstance(tensors, Mapping | Sequence):
        raise KindError(f"tensors is a {type(tensors).__name__}, expected data by name or in the order of {', '.join(net.names)}")
    given = _by_name(net, tensors)
    for name, tensor in given.items():
        if not hasattr(tensor, "shape") or not hasattr(tensor, "reshape"):
            raise KindError(f"tensor {name!r} is a {type(tensor).__name__}, expected a torch tensor or a NumPy array")
    sizes = net.bind([tensor.shape for tensor in given.values()])
    if tags is not None and not isinstance(tags, Mapping):
        raise KindError(f"tags is a {type(tags).__name__}, expected tags by tensor name")
    more = dict(tags or {})
    for name, own in more.items():
        net.term(name)
        if isinstance(own, str) or not isinstance(own, Iterable):
            raise KindError(f"tags of {name!r} are {own!r}, expected a list of words")
    made = []
    split: dict[tuple, Any] = {}  # one object for a tensor that stands twice, by which `from_quimb` knows it
    for term in net.spec.operands:
        role = "core" if term.name in net.cores else "const" if term.name in net.consts else "input"
        shape = tuple(sizes[axis] for axis in term.axes)
        data = split.setdefault((term.name, shape), given[term.name].reshape(shape))
        made.append(qtn.Tensor(data, inds=term.axes, tags=[term.name, _ROLE + role, *more.get(term.name, ())]))
    return qtn.TensorNetwork(made, check_collisions=False)


def from_quimb(tnet: Any, output: Sequence[str] | None = None) -> FromQuimb:
    """A quimb TensorNetwork as a Network and its tensors.

    Args:
        tnet: a `quimb.tensor.TensorNetwork`; its exponent is multiplied into the first tensor.
        output: indices of the result in order. If None, those on one tensor only; a network with hyperindices has to say.

    Returns:
        FromQuimb; `network, tensors = tn.from_quimb(tnet)`. A tensor is named by its first tag (numbered where several share it), with
        the role that `Network.to_quimb` gave it. Indices keep their names where these are words; all sizes but that of `...` are known.

    Raises:
        KindError: no network. SpecError: hyperindices without `output`, an unknown index in it, or no tensors.

    >>> import quimb.tensor as qtn, tn
    >>> net, tensors = tn.from_quimb(qtn.TensorNetwork([qtn.rand_tensor((2, 3), "ab", "A"), qtn.rand_tensor((3, 4), "bc", "B")]))
    >>> str(net.spec), tn.contract(str(net.spec), *tensors.values()).shape
    ('A: a b, B: b c -> a c', (2, 4))
    """
    if not hasattr(tnet, "tensor_map"):
        raise KindError(f"got a {type(tnet).__name__}, expected a quimb.tensor.TensorNetwork")
    parts = list(tnet.tensor_map.values())
    if not parts:
        raise SpecError("the quimb network has no tensors")
    if output is None:
        hyper = tnet.get_hyperinds()
        if hyper:
            raise SpecError(f"indices {sorted(hyper)} are on three or more tensors: say which ones the result has, output=(…)")
        output = tnet.outer_inds()
    for index in output:
        if index not in tnet.ind_map:
            raise SpecError(unknown("index", index, tnet.ind_map))
    words = _words(parts, output)
    names = _names(parts)
    tensors: dict[str, Any] = {}
    for name, part in zip(names, parts, strict=True):
        tensors.setdefault(name, part.data)
    if tnet.exponent:
        tensors[names[0]] = tensors[names[0]] * 10**tnet.exponent
    operands = tuple(Term(name, tuple((words[index],) for index in part.inds)) for name, part in zip(names, parts, strict=True))
    spec = Spec(operands, (Term("y0", tuple((words[index],) for index in output)),))
    sizes = {words[index]: int(tnet.ind_size(index)) for index in tnet.ind_map if words[index] != ROWS}
    tags = {name: tuple(part.tags) for name, part in zip(names, parts, strict=True)}
    roles = {role: [name for name in tensors if _ROLE + role in tags[name]] for role in ("core", "const")}
    return FromQuimb(network(spec, sizes, cores=roles["core"], consts=roles["const"]), tensors, tags)


def _by_name(net: Network, tensors: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if not isinstance(tensors, Mapping):
        if len(tensors) != len(net.names):
            raise SpecError(f"network has {len(net.names)} tensors ({', '.join(net.names)}), got {len(tensors)}")
        return dict(zip(net.names, tensors, strict=True))
    for name in tensors:
        net.term(name)
    missing = [name for name in net.names if name not in tensors]
    if missing:
        raise SpecError(f"tensor {missing[0]!r} is missing; the network has {', '.join(net.names)}")
    return {name: tensors[name] for name in net.names}


def _words(parts: Sequence[Any], output: Sequence[str]) -> dict[str, str]:
    """The axis word of every index; `...` stays what it is where it comes first everywhere."""
    terms = [tuple(part.inds) for part in parts] + [tuple(output)]
    words: dict = axis_words(index for term in terms for index in term)
    if all(ROWS not in term[1:] for term in terms) and ROWS in words:
        words[ROWS] = ROWS
    return words


def _names(parts: Sequence[Any]) -> list[str]:
    """A word for each tensor from its first tag; one name where the same data stands twice, numbered names otherwise."""
    names: list[str] = []
    holders: dict[str, Any] = {}
    for i, part in enumerate(parts):
        tag = next((tag for tag in part.tags if not tag.startswith(_ROLE)), f"t{i}")
        base = name = re.sub(r"\W", "_", tag, flags=re.ASCII) if re.match(r"[A-Za-z_]", tag) else f"t_{re.sub(r'[^A-Za-z0-9_]', '_', tag)}"
        count = 1
        while name in holders and holders[name] is not part.data:
            name, count = f"{base}_{count}", count + 1
        holders.setdefault(name, part.data)
        names.append(name)
    return names
