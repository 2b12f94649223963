"""The gated MLP, and what smoothing does to outlier channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.numerics import sqnr_db
from lowprec_jax.ops.smoothing import channel_factors, fold_factors, smooth_dot_general
from lowprec_jax.recipes import Column, Role

from .helpers import assert_same

TOKENS, FEATURES, HIDDEN, OUTLIERS = 64, 16, 32, 2
X = jax.random.normal(jax.random.key(0), (TOKENS, FEATURES))
MATMUL = (((1,), (0,)), ((), ()))


def mlp(gain=1.0, **options):
    """Gate and up weights of the first channels are aligned: their output is quadratic."""
    layer = lp.nnx.GatedMlp(FEATURES, HIDDEN, rngs=nnx.Rngs(0), **options)
    kernel = layer.gate_up.kernel[...]
    aligned = gain * kernel[:, 0, :OUTLIERS]
    layer.gate_up.kernel[...] = kernel.at[:, :, :OUTLIERS].set(aligned[:, None])
    return layer


def hidden_and_kernel(gain):
    layer = mlp(gain, recipe="none")
    return layer.hidden(X), layer.down.kernel[...]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smooth_dot_general__recipe_none__is_the_plain_product_bitwise(dtype):
    h, kernel = (x.astype(dtype) for x in hidden_and_kernel(100.0))
    h = h.at[:, 5].set(0)
    found = jax.jit(lambda h, w: smooth_dot_general(h, w, MATMUL, recipe="none"))(h, kernel)
    assert_same(found, jax.jit(lambda h, w: jax.lax.dot_general(h, w, MATMUL))(h, kernel))
    factors = channel_factors(h, kernel)
    assert factors[:OUTLIERS].max() < 2**-3
    assert factors[5] == 1  # nothing is known of a channel of zeros
    assert (np.frexp(factors)[0] == 0.5).all()


def test_smooth_dot_general__aligned_outliers__other_channels_keep_their_resolution():
    h, kernel = hidden_and_kernel(128.0)
    # Tokens that the gate of the outliers shuts show what the other channels have left.
    shut = np.abs(h[:, :OUTLIERS]).max(1) < 1e-3
    assert 4 < shut.sum() < TOKENS / 2
    exact = jnp.matmul(h, kernel, precision="highest")[shut]

    def sqnr(op):
        return sqnr_db(exact, op(h, kernel, MATMUL, recipe="fp8_current")[shut])

    assert sqnr(lp.ops.dot_general) < 15
    assert sqnr(smooth_dot_general) > 25


@pytest.mark.parametrize("op", [lp.nnx.DotGeneral, lp.nnx.SmoothDotGeneral])
def test_smooth_dot_general__delayed__a_channel_that_grows_at_once_does_not_saturate(op):
    site = op("fp8_delayed")
    step = nnx.jit(lp.nnx.value_and_grad(lambda site, h, w: site(h, w, MATMUL).mean()))
    for gain in (1.0, 64.0):
        step(site, *hidden_and_kernel(gain))
    observed = next(iter(lp.nnx.scaling_state(site).values()))["observed"]
    saturated = observed[: Role.OUTPUT_GRAD, Column.SATURATED].sum()
    if op is lp.nnx.SmoothDotGeneral:
        assert saturated == 0
    else:
        assert saturated > TOKENS / 2


def test_smooth_dot_general__gradients_in_high_precision__are_those_of_the_product():
    h, kernel = hidden_and_kernel(32.0)

    def gradients(op):
        return jax.jit(jax.grad(lambda h, w: jnp.sin(op(h, w)).sum(), argnums=(0, 1)))(h, kernel)

    smoothed = gradients(lambda h, w: smooth_dot_general(h, w, MATMUL, recipe="none"))
    assert_same(smoothed, gradients(lambda h, w: jax.lax.dot_general(h, w, MATMUL)))


def test_fold_factors__recipe_none__the_function_is_the_same_bitwise():
    layer = mlp(64.0, recipe="none")
    before, kernel = layer(X), layer.gate_up.kernel[...]
    factors = channel_factors(layer.hidden(X), layer.down.kernel[...])
    up, down = fold_factors(kernel[:, 1], layer.down.kernel[...], factors)
    layer.gate_up.kernel[...] = kernel.at[:, 1].set(up)
    layer.down.kernel[...] = down
    assert_same(layer(X), before)
    assert (channel_factors(layer.hidden(X), down) >= 0.5).all()


def test_smooth_dot_general__several_contracted_axes__are_refused():
    with pytest.raises(UserError, match="one axis of channels"):
        smooth_dot_general(X, X, (((0, 1), (0, 1)), ((), ())), recipe="none")


def test_gated_mlp__fused_and_not__are_the_formula():
    fused = mlp(recipe="none", use_bias=True, activation=jax.nn.gelu)
    apart = lp.nnx.GatedMlp(
        FEATURES,
        HIDDEN,
        recipe="none",
        fused=False,
        use_bias=True,
        activation=jax.nn.gelu,
        rngs=nnx.Rngs(0),
    )
    apart.gate.kernel[...], apart.up.kernel[...] = fused.gate_up.kernel[...].transpose(1, 0, 2)
    apart.down.kernel[...] = fused.down.kernel[...]
    gate, up = (np.asarray(X @ k.kernel[...]) for k in (apart.gate, apart.up))
    expected = (np.asarray(jax.nn.gelu(gate)) * up) @ np.asarray(fused.down.kernel[...])
    for layer in (fused, apart):
        np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-5)


def test_quantize__smoothed_layer__gets_the_recipe_and_stays_smoothed():
    mlp = lp.nnx.GatedMlp(8, 16, smooth=True, recipe="fp8_current", rngs=nnx.Rngs(0))
    lp.nnx.quantize(mlp, [(".*", "fp8_delayed")])
    assert type(mlp.down.dot_general) is lp.nnx.SmoothDotGeneral
    assert mlp.down.dot_general.recipe.name == "fp8_delayed"
