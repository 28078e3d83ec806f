"""The mathematics of PyTorch's operations on elements, a function each, in the order of their arguments.

Divisions, roots and functions are those of CUDA's mathematics library, which PyTorch calls too: Triton's own are faster
and less exact. A name that ends in "_" is one that Python or Triton has taken.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

_LN2 = tl.constexpr(0.6931471805599453)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)


# What others use


@triton.jit
def divide(a, b):
    """a / b, rounded as IEEE says."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _one(x):
    return tl.full((), 1, x.dtype)


@triton.jit
def _zero(x):
    return tl.full((), 0, x.dtype)


# Functions of one argument


@triton.jit
def acos(x):
    return libdevice.acos(x)


@triton.jit
def acosh(x):
    return libdevice.acosh(x)


@triton.jit
def asin(x):
    return libdevice.asin(x)


@triton.jit
def asinh(x):
    return libdevice.asinh(x)


@triton.jit
def atan(x):
    return libdevice.atan(x)


@triton.jit
def atanh(x):
    return libdevice.atanh(x)


@triton.jit
def cos(x):
    return libdevice.cos(x)


@triton.jit
def cosh(x):
    return libdevice.cosh(x)


@triton.jit
def erf(x):
    return libdevice.erf(x)


@triton.jit
def erfc(x):
    return libdevice.erfc(x)


@triton.jit
def exp(x):
    return libdevice.exp(x)


@triton.jit
def exp2(x):
    return libdevice.exp2(x)


@triton.jit
def expm1(x):
    return libdevice.expm1(x)


@triton.jit
def log(x):
    return libdevice.log(x)


@triton.jit
def log10(x):
    return libdevice.log10(x)


@triton.jit
def log1p(x):
    return libdevice.log1p(x)


@triton.jit
def log2(x):
    return libdevice.log2(x)


@triton.jit
def sin(x):
    return libdevice.sin(x)


@triton.jit
def sinh(x):
    return libdevice.sinh(x)


@triton.jit
def sqrt(x):
    return libdevice.sqrt(x)


@triton.jit
def tan(x):
    return libdevice.tan(x)


@triton.jit
def tanh(x):
    return libdevice.tanh(x)


@triton.jit
def rsqrt(x):
    return divide(_one(x), libdevice.sqrt(x))


@triton.jit
def reciprocal(x):
    return divide(_one(x), x)


@triton.jit
def sigmoid(x):
    return divide(_one(x), 1 + libdevice.exp(-x))


@triton.jit
def log_odds(x):
    return libdevice.log(divide(x, 1 - x))


@triton.jit
def logit(x, eps):
    return log_odds(tl.where(x < eps, eps, tl.where(x > 1 - eps, 1 - eps, x)))


@triton.jit
def sinc(x):
    angle = x * 3.141592653589793
    return tl.where(x == 0, _one(x), divide(libdevice.sin(angle), angle))


@triton.jit
def deg2rad(x):
    return x * 0.017453292519943295


@triton.jit
def rad2deg(x):
    return x * 57.29577951308232


@triton.jit
def abs_(x):
    return tl.where(x < 0, -x, x) if not x.dtype.is_floating() else tl.abs(x)


@triton.jit
def neg(x):
    return -x


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def ceil(x):
    return libdevice.ceil(x) if x.dtype.is_floating() else x


@triton.jit
def floor(x):
    return libdevice.floor(x) if x.dtype.is_floating() else x


@triton.jit
def trunc(x):
    return libdevice.trunc(x) if x.dtype.is_floating() else x


@triton.jit
def round_(x):
    return libdevice.rint(x) if x.dtype.is_floating() else x


@triton.jit
def frac(x):
    return x - libdevice.trunc(x)


@triton.jit
def copy(destination, source, NON_BLOCKING: tl.constexpr):
    return source


@triton.jit
def fill(x, value):
    return value


@triton.jit
def zero(x):
    return _zero(x)


@triton.jit
def bitwise_not(x):
    return _zero(x) - x - 1


@triton.jit
def logical_not(x):
    return x == 0


@triton.jit
def isnan(x):
    return x != x


@triton.jit
def isinf(x):
    return (x == float("inf")) | (x == float("-inf"))


@triton.jit
def isposinf(x):
    return x == float("inf")


@triton.jit
def isneginf(x):
    return x == float("-inf")


@triton.jit
def signbit(x):
    return libdevice.signbit(x) != 0 if x.dtype.is_floating() else x < 0


@triton.jit
def nan_to_num(x, nan, posinf, neginf):
    """The limits come as numbers: what they are if nobody says is known where the dtype of the result is."""
    y = tl.where(x != x, nan, x)
    y = tl.where(x == float("inf"), posinf, y)
    return tl.where(x == float("-inf"), neginf, y)


# Activations


@triton.jit
def relu(x):
    return tl.where(x < 0, _zero(x), x)


@triton.jit
def silu(x):
    return divide(x, 1 + libdevice.exp(-x))


@triton.jit
def gelu(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE == "tanh":
        return 0.5 * x * (1 + libdevice.tanh((x + 0.044715 * x * x * x) * _SQRT_2_OVER_PI))
    else:
        return 0.5 * x * (1 + libdevice.erf(x * _SQRT_HALF))


@triton.jit
def softplus(x, beta, threshold):
    return tl.where(x * beta > threshold, x, divide(libdevice.log1p(libdevice.exp(x * beta)), beta + _zero(x)))


@triton.jit
def mish(x):
    return x * libdevice.tanh(libdevice.log1p(libdevice.exp(x)))


@triton.jit
def hardsigmoid(x):
    return divide(tl.minimum(tl.maximum(x + 3, 0.0, tl.PropagateNan.ALL), 6.0, tl.PropagateNan.ALL), _one(x) * 6)


@triton.jit
def hardswish(x):
    return divide(x * tl.minimum(tl.maximum(x + 3, 0.0, tl.PropagateNan.ALL), 6.0, tl.PropagateNan.ALL), _one(x) * 6)


@triton.jit
def hardtanh(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def hardshrink(x, lambd):
    return tl.where((x >= -lambd) & (x <= lambd), _zero(x), x)


@triton.jit
def softshrink(x, lambd):
    return tl.where(x > lambd, x - lambd, tl.where(x < -lambd, x + lambd, x * 0))


@triton.jit
def leaky_relu(x, slope):
    return tl.where(x > 0, x, x * slope)


@triton.jit
def elu(x, alpha, scale, input_scale):
    return tl.where(x < 0, libdevice.expm1(x * input_scale) * (alpha * scale), x * scale)


@triton.jit
def celu(x, alpha):
    return tl.where(x < 0, libdevice.expm1(divide(x, alpha + _zero(x))) * alpha, x)


@triton.jit
def threshold(x, limit, value):
    return tl.where(x <= limit, value, x)


# Functions of two arguments


@triton.jit
def add(a, b, alpha):
    return a + b * alpha


@triton.jit
def sub(a, b, alpha):
    return a - b * alpha


@triton.jit
def rsub(a, b, alpha):
    return b - a * alpha


@triton.jit
def mul(a, b):
    return a * b


@triton.jit
def floor_divide(a, b):
    """As Python's //, step by step as PyTorch does it: the quotient of what the remainder leaves."""
    if a.dtype.is_floating():
        a = a + _zero(b)  # a tile, if either is one
        b = b + _zero(a)
        rest = libdevice.fmod(a, b)
        quotient = divide(a - rest, b)
        quotient = tl.where((rest != 0) & ((b < 0) != (rest < 0)), quotient - 1, quotient)
        whole = libdevice.floor(quotient)
        whole = tl.where(quotient - whole > 0.5, whole + 1, whole)
        whole = tl.where(quotient != 0, whole, libdevice.copysign(_zero(a) + a * 0, divide(a, b)))
        return tl.where(b != 0, whole, divide(a, b))
    else:
        rest = a % b
        return a // b - ((rest != 0) & ((b < 0) != (rest < 0))).to(a.dtype)


@triton.jit
def true_divide(a, b):
    return divide(a + _zero(b), b + _zero(a))


@triton.jit
def div(a, b, MODE: tl.constexpr):
    if MODE == "floor":
        return floor_divide(a, b)
    else:
        return libdevice.trunc(divide(a + _zero(b), b + _zero(a))) if a.dtype.is_floating() else a // b


@triton.jit
def remainder(a, b):
    """Of the divisor's sign."""
    rest = libdevice.fmod(a + _zero(b), b + _zero(a)) if a.dtype.is_floating() else a % b
    return tl.where((rest != 0) & ((b < 0) != (rest < 0)), rest + b, rest)


@triton.jit
def fmod(a, b):
    """Of the dividend's sign."""
    return libdevice.fmod(a + _zero(b), b + _zero(a)) if a.dtype.is_floating() else a % b


@triton.jit
def pow_(a, b):
    if b.type.is_block():
        return libdevice.pow(a + _zero(b), b + _zero(a))
    else:
        # Norms ask for squares, which PyTorch multiplies out, too.
        y = a * a
        if b != 2:
            y = libdevice.pow(a, b + _zero(a))
        return y


@triton.jit
def atan2(a, b):
    return libdevice.atan2(a, b)


@triton.jit
def hypot(a, b):
    return libdevice.hypot(a, b)


@triton.jit
def copysign(a, b):
    return libdevice.copysign(a + _zero(b), b + _zero(a))


@triton.jit
def heaviside(x, values):
    return tl.where(x == 0, values, (x > 0).to(x.dtype))


@triton.jit
def logaddexp(a, b):
    """Equal infinities are their own sum: their difference is none."""
    most = tl.maximum(a, b, tl.PropagateNan.ALL)
    sum_ = most + libdevice.log1p(libdevice.exp(-tl.abs(a - b)))
    return tl.where((a == b) & (tl.abs(a) == float("inf")), a, sum_)


@triton.jit
def logaddexp2(a, b):
    most = tl.maximum(a, b, tl.PropagateNan.ALL)
    sum_ = most + divide(libdevice.log1p(libdevice.exp2(-tl.abs(a - b))), _one(a) * _LN2)
    return tl.where((a == b) & (tl.abs(a) == float("inf")), a, sum_)


@triton.jit
def xlogy(a, b):
    return tl.where(b != b, b, tl.where(a == 0, _zero(a), a * libdevice.log(b + _zero(a))))


@triton.jit
def maximum(a, b):
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def minimum(a, b):
    return tl.where((a != a) | (a < b), a, b)


@triton.jit
def fmax(a, b):
    return tl.where((b != b) | (a > b), a, b)


@triton.jit
def fmin(a, b):
    return tl.where((b != b) | (a < b), a, b)


@triton.jit
def eq(a, b):
    return a == b


@triton.jit
def ne(a, b):
    return a != b


@triton.jit
def lt(a, b):
    return a < b


@triton.jit
def le(a, b):
    return a <= b


@triton.jit
def gt(a, b):
    return a > b


@triton.jit
def ge(a, b):
    return a >= b


@triton.jit
def logical_and(a, b):
    return (a != 0) & (b != 0)


@triton.jit
def logical_or(a, b):
    return (a != 0) | (b != 0)


@triton.jit
def logical_xor(a, b):
    return (a != 0) ^ (b != 0)


@triton.jit
def bitwise_and(a, b):
    return a & b


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def bitwise_xor(a, b):
    return a ^ b


@triton.jit
def bitwise_left_shift(a, b):
    """Nothing is left beyond the width, which the hardware does not promise."""
    out_of_range = (b < 0) | (b >= a.dtype.primitive_bitwidth)
    return tl.where(out_of_range, _zero(a), a << tl.where(out_of_range, _zero(b), b))


@triton.jit
def bitwise_right_shift(a, b):
    """Nothing but the sign is left beyond the width."""
    out_of_range = (b < 0) | (b >= a.dtype.primitive_bitwidth)
    return a >> tl.where(out_of_range, _zero(b) + (a.dtype.primitive_bitwidth - 1), b)


# Functions of more


@triton.jit
def where(condition, a, b):
    return tl.where(condition != 0, a, b)


@triton.jit
def masked_fill(x, mask, value):
    return tl.where(mask != 0, value, x)


@triton.jit
def clamp_min(x, low):
    return tl.where((x != x) | (x > low), x, low)


@triton.jit
def clamp_max(x, high):
    return tl.where((x != x) | (x < high), x, high)


@triton.jit
def clamp(x, low, high):
    """A NaN stays, of a limit too; where the limits cross, the upper one counts."""
    return clamp_max(clamp_min(x, low), high)


@triton.jit
def lerp(a, b, weight):
    """From the nearer end, as PyTorch does it, so that both ends are met."""
    return tl.where(tl.abs(weight) < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


@triton.jit
def addcmul(x, a, b, value):
    return x + value * a * b


@triton.jit
def addcdiv(x, a, b, value):
    return x + value * divide(a, b)


# Gradients


@triton.jit
def sigmoid_backward(gradient, y):
    return gradient * (1 - y) * y


@triton.jit
def tanh_backward(gradient, y):
    return gradient * (1 - y * y)


@triton.jit
def silu_backward(gradient, x):
    y = sigmoid(x)
    return gradient * y * (1 + x * (1 - y))


@triton.jit
def gelu_backward(gradient, x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE == "tanh":
        inside = libdevice.tanh((x + 0.044715 * x * x * x) * _SQRT_2_OVER_PI)
        slope = (1 + 3 * 0.044715 * x * x) * _SQRT_2_OVER_PI
        return gradient * (0.5 * (1 + inside) + 0.5 * x * (1 - inside * inside) * slope)
    else:
        density = libdevice.exp(-0.5 * x * x) * _ONE_OVER_SQRT_2_PI
        return gradient * (0.5 * (1 + libdevice.erf(x * _SQRT_HALF)) + x * density)


@triton.jit
def threshold_backward(gradient, x, limit):
    return tl.where(x <= limit, _zero(x), gradient)


@triton.jit
def hardtanh_backward(gradient, x, low, high):
    return tl.where((x <= low) | (x >= high), _zero(x), gradient)


@triton.jit
def hardsigmoid_backward(gradient, x):
    return tl.where((x > -3) & (x < 3), divide(gradient, _one(x) * 6), _zero(x))


@triton.jit
def hardswish_backward(gradient, x):
    inside = gradient * (divide(x, _one(x) * 3) + 0.5)
    return tl.where(x <= -3, _zero(x), tl.where(x < 3, inside, gradient))


@triton.jit
def hardshrink_backward(gradient, x, lambd):
    return tl.where((x >= -lambd) & (x <= lambd), _zero(x), gradient)


@triton.jit
def softshrink_backward(gradient, x, lambd):
    return tl.where((x >= -lambd) & (x <= lambd), _zero(x), gradient)


@triton.jit
def leaky_relu_backward(gradient, x, slope, IS_RESULT: tl.constexpr):
    return tl.where(x > 0, gradient, gradient * slope)


@triton.jit
def softplus_backward(gradient, x, beta, threshold):
    z = libdevice.exp(x * beta)
    return tl.where(x * beta > threshold, gradient, divide(gradient * z, z + 1))


@triton.jit
def logit_backward(gradient, x, eps):
    return tl.where((x < eps) | (x > 1 - eps), _zero(x), divide(gradient, x * (1 - x)))


@triton.jit
def log_odds_backward(gradient, x):
    return tl.where((x < 0) | (x > 1), float("nan"), divide(gradient, x * (1 - x)))


@triton.jit
def mish_backward(gradient, x):
    inside = libdevice.tanh(libdevice.log1p(libdevice.exp(x)))
    return gradient * (inside + x * sigmoid(x) * (1 - inside * inside))
