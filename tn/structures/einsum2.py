"""einsum2: every two-core structure, as a point θ of a continuous space (Potapczynski et al. 2024, arXiv:2410.02117).

θ = (α, β, γ, δ, ε, φ, ρ): input axes a, b, g of sizes d_in^α, d_in^β, d_in^γ, output axes d, e, f of sizes d_out^δ, d_out^ε, d_out^φ, rank
min(d_in, d_out)^ρ; α+β+γ = 1 = δ+ε+φ. W[(f e d), (g b a)] = Σ_r first[g,a,f,d,r] second[g,b,f,e,r]. Low rank is (1,0,0,0,1,0,ρ),
Kronecker (½,½,0,½,½,0,0), tensor train the same with ρ > 0, block tensor train (½,0,½,0,½,½,ρ), which is the default with ρ = 0.
"""

import itertools
import math
import re
from collections.abc import Mapping
from fractions import Fraction

from torch import Tensor

from tn.errors import StructureError
from tn.structures.registry import Built, Factors, Options, Structure, register

DEFAULT = (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0)
_NEAR = 1.25  # sizes this far from their wish are taken to avoid padding


def read(theta: str | tuple[float, ...]) -> tuple[float, ...]:
    """θ as seven numbers. Raises StructureError unless the first and the second three add up to one and all lie between 0 and 1.

    >>> read("(1/2|0|1/2|0|1/2|1/2|1/4)")
    (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.25)
    """
    expected = "seven numbers from 0 to 1, (alpha, beta, gamma, delta, epsilon, phi, rho), with alpha+beta+gamma = 1 = delta+epsilon+phi"
    try:
        words = re.split(r"[|,]", theta.strip().strip("()")) if isinstance(theta, str) else list(theta)
        values = tuple(float(Fraction(word.strip()) if isinstance(word, str) else word) for word in words)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise StructureError(f"theta is {theta!r}, expected {expected}") from error
    sums = math.isclose(sum(values[:3]), 1, abs_tol=1e-6) and math.isclose(sum(values[3:6]), 1, abs_tol=1e-6)
    if len(values) != 7 or not all(0 <= value <= 1 for value in values) or not sums:
        raise StructureError(f"theta is {theta!r}, expected {expected}")
    return values


def exponents(theta: str | tuple[float, ...]) -> dict[str, float]:
    """ν, ω, ψ of a square layer: multiply-adds d^(1+ν), parameters over multiply-adds d^-ω, rank d^ψ.

    >>> exponents("(1/2|0|1/2|0|1/2|1/2|0)")
    {'nu': 0.5, 'omega': 0.0, 'psi': 1.0}
    """
    return _exponents(read(theta))


def _exponents(theta: tuple[float, ...]) -> dict[str, float]:
    alpha, beta, _, delta, epsilon, _, rho = theta
    least = min(alpha, epsilon)
    return {"nu": 1 + rho - least, "omega": min(alpha + delta, beta + epsilon) - least, "psi": 1 + min(0.0, 1 + rho - alpha - epsilon)}


def _sizes(size: int, wishes: tuple[float, ...]) -> tuple[int, ...]:
    """Three factors near size^wish: an exact split if one has every factor within 25 % of its wish, else the least padding around it."""
    wanted = [size**wish for wish in wishes]
    free = [i for i, wish in enumerate(wishes) if wish > 0]
    choices = [range(max(1, math.floor(w / _NEAR)), math.ceil(w * _NEAR) + 1) if i in free else (1,) for i, w in enumerate(wanted)]
    if len(free) == 1:
        return tuple(size if i in free else 1 for i in range(3))
    found = []
    last = free[-1]
    for head in itertools.product(*(c for i, c in enumerate(choices) if i != last)):
        split = list(head)
        split.insert(last, max(-(-size // math.prod(head)), choices[last][0]))
        off = sum(abs(math.log(s / w)) for s, w in zip(split, wanted, strict=True))
        found.append((math.prod(split) != size, off + 2 * math.log(math.prod(split) / size), tuple(split)))
    return min(found)[2]


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """((g, b, a), (f, e, d)).

    >>> default_factors(1024, 4096, Options())
    ((32, 1, 32), (64, 64, 1))
    """
    alpha, beta, gamma, delta, epsilon, phi, _ = read(options.theta or DEFAULT)
    return _sizes(d_in, (gamma, beta, alpha)), _sizes(d_out, (phi, epsilon, delta))


def default_rank(factors: Factors, options: Options) -> int:
    """min(d_in, d_out)^ρ, rounded."""
    rho = read(options.theta or DEFAULT)[-1]
    return max(1, round(min(math.prod(factors[0]), math.prod(factors[1])) ** rho))


def theta_of(built: Built) -> tuple[float, ...]:
    """The θ of sizes: logarithms of the factors."""
    s = built.network.sizes
    parts = [math.log(max(built.d_in, 2))] * 3 + [math.log(max(built.d_out, 2))] * 3 + [math.log(max(min(built.d_in, built.d_out), 2))]
    return tuple(math.log(s[axis]) / part for axis, part in zip("abgdefr", parts, strict=True))


def note(built: Built) -> str:
    """θ, ν, ω and ψ of the sizes that were chosen."""
    theta = theta_of(built)
    nu, omega, psi = _exponents(theta).values()
    return f"θ ({'|'.join(f'{value:.2f}' for value in theta)}) ν {nu:.2f} ω {omega:.2f} ψ {psi:.2f}"


def from_btt(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block tensor train of two cores is the point where b and d have size one."""
    if len(cores) != 2:
        raise StructureError(f"einsum2 has two cores, this btt has {len(cores)}")
    first, second = cores["first"], cores["second"]  # (i, j, r, k), (k, i, r, l)
    return {"first": first.permute(0, 1, 3, 2).unsqueeze(3), "second": second.permute(1, 0, 3, 2).unsqueeze(1)}


def from_tt(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor train of two cores is the point where g and f have size one; its second core works on the fast axes."""
    if len(cores) != 2:
        raise StructureError(f"einsum2 has two cores, this tt has {len(cores)}")
    first, second = cores["first"], cores["second"]  # (i, k, r), (r, j, l)
    return {"first": second.permute(1, 2, 0)[None, :, None], "second": first[None, :, None]}


register(
    Structure(
        name="einsum2",
        summary="two cores at any point of the space of two-core contractions",
        spec=lambda _: "x: ... (g b a), first: g a f d r, second: g b f e r -> ... (f e d)",
        factors=default_factors,
        rank=default_rank,
        takes=("rank", "factors", "theta"),
        note=note,
        contains={"btt": from_btt, "tt": from_tt},
    )
)
