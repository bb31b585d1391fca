"""Powers of the decay and of two, as the kernels compute them; Triton's kernels and Gluon's call the same functions."""

import triton
import triton.language as tl


@triton.jit
def natural_decay(log_decay, head):
    """The head's log λ, 0 where there is none.

    Not below -700, whose exponential is 0: a decay of 0 comes as -inf or as the least float32, and times no rows those
    would be NaN.
    """
    if log_decay is None:
        x = (head * 0).to(tl.float32)
    else:
        x = tl.load(log_decay + head)
        x = tl.where(x < -700.0, -700.0, x)
    return x


@triton.jit
def log2_decay(log_decay, head):
    """The head's decay as a power of two."""
    return natural_decay(log_decay, head) * 1.4426950408889634  # log2 e


@triton.jit
def whole_and_rest(x):
    """e^x for x ≤ 0 as a sum of two, 1 or 0 and the rest.

    A factor near 1 in float32, and more so what a GPU's fast exponential makes of it, is off by up to 2.4e-7; after n
    products one by one that is n times as much, always in one direction. What is left of 1, expm1(x), is not.
    """
    slow = tl.abs(x) < 0.25  # there the series' error is 1e-9 of it
    y = tl.where(slow, x, 0.0)
    near_zero = y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040)))))))
    return tl.where(slow, 1.0, 0.0), tl.where(slow, near_zero, tl.exp2(x * 1.4426950408889634))


@triton.jit
def what_is_lost(rate, tokens):
    """λ^tokens − 1, for one sum of products: S + S (λ^m − 1)."""
    whole, rest = whole_and_rest(rate * tokens * 0.6931471805599453)
    return rest + (whole - 1.0)


@triton.jit
def advance(rate, elapsed, tokens):
    """How a state that is carried lazily gets past a block of so many tokens.

    What is carried is S / λ^elapsed, where ``elapsed`` rows went by since it last was S: until it has decayed to a half
    it is left as it is, and not rounded in every block. That goes wrong in one direction where a decay is slow, by
    6.6e-6 after 4096 rows in blocks of 16, and by 2.6e-8 like this. Returned are the next elapsed and, as
    ``whole_and_rest``, by what to multiply.
    """
    ahead = elapsed + tokens
    whole, rest = whole_and_rest(rate * ahead * 0.6931471805599453)
    halved = rate * ahead < -1.0
    return tl.where(halved, 0, ahead), tl.where(halved, whole, 1.0), tl.where(halved, rest, 0.0)


@triton.jit
def carried_units(rate, scale, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """In which power of two, its exponent, a sweep carries its state, and what weighs c besides powers of λ.

    It is 1, but where time is reversed. There it is λ · scale, which may be next to nothing; columns of float16 (HALF)
    keep their bits all the same.
    """
    unit = 0.0
    weight = 1.0
    if REVERSE:
        weight = scale
        if HALF:
            unit = tl.minimum(tl.maximum(tl.ceil(rate + tl.log2(tl.abs(scale))), -64.0), 64.0)
            weight *= tl.exp2(-unit)
    return unit, weight


@triton.jit
def power_below(x):
    """The power of two at or below each x ≥ 0, and its inverse: float16 holds x times the inverse, whatever x is."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)
