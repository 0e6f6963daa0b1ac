"""The op table: what `ops=autocast` does with operations that are not products.

Categories, the ones of torch.amp by other names:

low       floating operands are cast to the policy's compute format, as those of products always are
float32   operands are widened to float32, and so is the result
promote   operands are brought to the widest type among them; Python scalars do not count
follow    runs in the type in which its operand comes
never     operands are brought back to the type that the model's author gave them; so is every operation that is not
          in the table, and what has a derivative or a loop of its own is entered or kept as it is

A rule overrides the table: `"bfloat16_autocast;**:tanh#*:op=low"`.

Source: the lists of torch.amp (pytorch/pytorch, aten/src/ATen/autocast_mode.h), by JAX primitive. Where torch lists a
composite (layer_norm, softmax, cross_entropy), JAX has its parts, and those are here; torch's float32 list is widened
by `square`, the second moment of norms, by `reduce_max`, which takes the whole of a softmax to float32, and by `sqrt`,
`logistic` and other functions whose results feed statistics.
"""

from collections.abc import Mapping
from types import MappingProxyType


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOW = ("dot_general", "conv_general_dilated")
FLOAT32 = _words("""
    acos acosh asin asinh atanh cosh erf_inv erfc exp exp2 expm1 log log1p log2 pow integer_pow square rsqrt sqrt
    cbrt sinh tan atan logistic one_minus_square polynomial lgamma digamma polygamma zeta igamma igammac
    igamma_grad_a bessel_i0e bessel_i1e regularized_incomplete_beta reduce_sum reduce_prod cumsum cumprod
    cumlogsumexp reduce_window_sum reduce_max reduce_min
""")
PROMOTE = _words("""
    add add_any sub mul div max min rem atan2  select_n clamp concatenate pad dynamic_update_slice eq ne lt
    le gt ge
""")
FOLLOW = _words("""
    reshape transpose broadcast_in_dim slice dynamic_slice gather squeeze rev copy copy_p sort cummax cummin argmax
    argmin top_k sign abs neg floor ceil round tanh erf sin cos stop_gradient is_finite reduce_window_max
    reduce_window_min split optimization_barrier sharding_constraint name
""")
# Functions of JAX, by the name of their jit or custom derivative: inside they are treated by the table, and the result
# returns to the type of the operand. It is what keeps activations in 16 bits.
ACTIVATIONS = _words("""
    relu relu6 silu gelu elu leaky_relu celu selu mish soft_sign hard_tanh squareplus
""")
# Bit patterns and random numbers mean something in one type only.
NEVER = _words("""
    bitcast_convert_type reduce_precision convert_element_type iota nextafter
""")

OP_TABLE: Mapping[str, str] = MappingProxyType(
    {
        name: category
        for category, names in (
            ("low", LOW),
            ("float32", FLOAT32),
            ("promote", PROMOTE),
            ("follow", FOLLOW),
            ("never", NEVER),
        )
        for name in names
    }
)
