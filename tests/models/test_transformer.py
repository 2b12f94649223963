import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowprec_jax.models import (
    Attention,
    Mlp,
    Transformer,
    TransformerConfig,
    next_token_loss,
    rope,
)

SMALL = TransformerConfig(
    vocab_size=13,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    width=24,
    mlp_width=20,
    max_context=9,
    init_scale=0.3,  # far from zero, so that every part shows in the outputs
)


def make(seed=0, **changes):
    return Transformer(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(seed))


def tokens(batch=2, length=7, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SMALL.vocab_size)


def compiled(function):
    """`jax.jit` that spends half the time on compiling; the arithmetic is the same."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def logits_of(model, ids):
    return compiled(lambda m, t: m(t))(model, ids)


def mean_loss(model, ids):
    total, count = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    return total / count


def loss_and_grads(model, ids):
    graphdef, params = nnx.split(model)
    run = compiled(jax.value_and_grad(lambda p: mean_loss(nnx.merge(graphdef, p), ids)))
    value, grads = run(params)
    return value, nnx.to_pure_dict(nnx.as_pure(grads))


@pytest.fixture(scope="module")
def unrolled():
    """Loss and gradients of the plainest model."""
    return loss_and_grads(make(scan_layers=False), tokens())


def stack_blocks(tree):
    """Parameters of an unrolled model in the layout of a scanned one."""
    layers = [tree["blocks"][i] for i in sorted(tree["blocks"])]
    return {**tree, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def assert_close(tree, expected, rel):
    """Largest error of each leaf, relative to the leaf's largest entry."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.abs(got - want).max() <= rel * np.abs(want).max()


def softmax64(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope64(x, base):
    """Rotation as multiplication of complex numbers; x is [T, heads, H]."""
    half = x.shape[-1] // 2
    turns = np.exp(1j * np.arange(len(x))[:, None] * base ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turns[:, None]
    return np.concatenate([z.real, z.imag], -1)


def attention64(x, qkv, out, heads, kv_heads, base):
    """One sequence [T, D], one query head after the other, kv heads repeated."""
    width = x.shape[-1]
    h = width // heads
    per_group = heads // kv_heads + 2
    columns = (x @ qkv).reshape(len(x), kv_heads * per_group, h)
    q_heads = [j for j in range(kv_heads * per_group) if j % per_group < per_group - 2]
    q = rope64(columns[:, q_heads], base)
    k = rope64(columns[:, per_group - 2 :: per_group], base)
    v = columns[:, per_group - 1 :: per_group]
    mixed = []
    for n in range(heads):
        shared = n // (heads // kv_heads)
        scores = q[:, n] @ k[:, shared].T / math.sqrt(h)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        mixed.append(softmax64(scores) @ v[:, shared])
    return np.concatenate(mixed, -1) @ out


def norm64(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def mlp64(x, first, down, kind):
    z = x @ first.reshape(len(first), -1)
    if kind == "gelu":
        hidden = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    else:
        gate, up = np.split(z, 2, axis=-1)
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ down


def model64(params, config, ids):
    """The whole model for one sequence, layer by layer, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embedding"]["embedding"][ids]
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        att, mlp = block["attention"], block["mlp"]
        x = x + attention64(
            norm64(x, block["attention_norm"]["scale"]),
            att["qkv"]["kernel"],
            att["out"]["kernel"],
            config.num_heads,
            config.num_kv_heads,
            config.rope_base,
        )
        first = mlp["up" if config.mlp == "gelu" else "gate_up"]["kernel"]
        z = norm64(x, block["mlp_norm"]["scale"])
        x = x + mlp64(z, first, mlp["down"]["kernel"], config.mlp)
    x = norm64(x, p["final_norm"]["scale"])
    return x @ (p["embedding"]["embedding"].T if config.tied_head else p["head"]["kernel"])


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_transformer__later_token_changed__earlier_logits_bitwise_equal(scan):
    model, ids = make(scan_layers=scan), tokens()
    changed = ids.at[:, 4].set((ids[:, 4] + 1) % SMALL.vocab_size)
    before, after = logits_of(model, ids), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-4)


def test_rope__all_positions_shifted__scores_unchanged():
    q, k = jax.random.normal(jax.random.key(1), (2, 2, 7, 3, 8))

    @compiled
    def scores_at(shift):
        turned = (rope(x, jnp.arange(7) + shift, 1e4) for x in (q, k))
        return jnp.einsum("BTNH,BSNH->BNTS", *turned)

    scores = [scores_at(shift) for shift in (0, 5, 100)]
    # f32 angles up to 106 radians are rounded by 106 * 2**-24.
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-4)
    assert np.abs(scores[0] - jnp.einsum("BTNH,BSNH->BNTS", q, k)).max() > 0.1


def test_rope__float16_input__keeps_dtype_and_norm():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8), jnp.float16)
    y = compiled(lambda x: rope(x, jnp.arange(5), 1e4))(x)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(y.astype(jnp.float32), axis=-1),
        jnp.linalg.norm(x.astype(jnp.float32), axis=-1),
        rtol=2.0**-10,
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_attention__numpy_float64_oracle__equal(kv_heads):
    config = dataclasses.replace(SMALL, num_kv_heads=kv_heads, rope_base=100.0)
    attention = Attention(config, rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(2, 7, 24))
    got = compiled(lambda m, x: m(x))(attention, jnp.asarray(x, jnp.float32))
    qkv, out = (np.asarray(w.kernel[...], np.float64) for w in (attention.qkv, attention.out))
    assert qkv.shape == (24, (4 + 2 * kv_heads) * 6)
    expected = [attention64(sequence, qkv, out, 4, kv_heads, 100.0) for sequence in x]
    assert_close(got, np.stack(expected), 2e-6)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_mlp__numpy_float64_oracle__equal(kind):
    mlp = Mlp(dataclasses.replace(SMALL, mlp=kind), rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(2, 7, 24))
    first = mlp.up if kind == "gelu" else mlp.gate_up
    expected = mlp64(
        x, np.asarray(first.kernel[...], np.float64), np.asarray(mlp.down.kernel[...]), kind
    )
    assert_close(mlp(jnp.asarray(x, jnp.float32)), expected, 2e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_transformer__numpy_float64_oracle__equal(kind, tied):
    model, ids = make(mlp=kind, tied_head=tied), tokens()
    # Norm scales other than one, or a norm that ignores its scale would pass.
    model.blocks.mlp_norm.scale[...] *= jnp.linspace(0.5, 1.5, 24)
    model.final_norm.scale[...] *= jnp.linspace(1.5, 0.5, 24)
    params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
    expected = np.stack([model64(params, model.config, row) for row in np.asarray(ids)])
    assert_close(logits_of(model, ids), expected, 5e-6)


def test_final_norm__tiny_and_huge_rows__rms_as_numpy():
    norm = make().final_norm
    x = np.random.default_rng(0).normal(size=(5, 24)) * np.array([[1e-3], [1], [30], [1e4], [1e8]])
    got = norm(jnp.asarray(x, jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, norm64(x, 1.0), rtol=1e-5)
    half = norm(jnp.asarray(x[:2], jnp.bfloat16))  # statistics in f32 for bfloat16 input
    expected = norm64(np.asarray(jnp.asarray(x[:2], jnp.bfloat16), np.float64), 1.0)
    np.testing.assert_allclose(half, expected, rtol=1e-5)


def test_transformer__scan_and_unrolled__same_rngs_give_equal_parameters():
    scanned = nnx.to_pure_dict(nnx.as_pure(nnx.state(make(scan_layers=True))))
    unrolled = nnx.to_pure_dict(nnx.as_pure(nnx.state(make(scan_layers=False))))
    jax.tree.map(np.testing.assert_array_equal, scanned, stack_blocks(unrolled))
    qkv = scanned["blocks"]["attention"]["qkv"]["kernel"]
    assert np.abs(qkv[0] - qkv[1]).max() > 0.1  # layers differ from each other


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(True, "none"), (True, "full"), (True, "dots"), (False, "full"), (False, "dots")],
)
def test_transformer__scan_and_remat__same_loss_and_gradients(scan, remat, unrolled):
    value, grads = loss_and_grads(make(scan_layers=scan, remat=remat), tokens())
    expected, expected_grads = unrolled
    assert abs(float(value) - float(expected)) <= 1e-6 * float(expected)
    # Measured over 8 seeds, scan against unrolled: bitwise equal; the gate allows fusions.
    assert_close(grads if scan else stack_blocks(grads), stack_blocks(expected_grads), 1e-6)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_transformer__remat__recomputes_what_the_name_says(scan):
    def count_dots(remat):
        model = make(scan_layers=scan, remat=remat)
        graphdef, state = nnx.split(model)

        def loss(state):
            return nnx.merge(graphdef, state)(tokens()).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(state)).count("dot_general[")

    none, dots, full = count_dots("none"), count_dots("dots"), count_dots("full")
    assert none == dots
    # 6 products in a block; its last one, `down`, is not needed by the backward pass.
    assert full - none >= 5 * (1 if scan else SMALL.num_layers)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformer__number_of_parameters__is_the_formula(scan, kind, tied):
    model = make(scan_layers=scan, mlp=kind, tied_head=tied)
    d, f, v, layers, h = 24, 20, 13, 3, 6
    block = d * (4 + 2 * 2) * h + d * d + (3 if kind == "swiglu" else 2) * d * f + 2 * d
    expected = layers * block + d + v * d * (1 if tied else 2)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == expected
    assert hasattr(model, "head") == (not tied)


def test_transformer__paths__are_those_that_rules_match():
    flat = nnx.to_flat_state(nnx.state(make(tied_head=False), nnx.Param))
    paths = {"/".join(map(str, path)) for path, _ in flat}
    assert paths == {
        "embedding/embedding",
        "blocks/attention_norm/scale",
        "blocks/attention/qkv/kernel",
        "blocks/attention/out/kernel",
        "blocks/mlp_norm/scale",
        "blocks/mlp/gate_up/kernel",
        "blocks/mlp/down/kernel",
        "final_norm/scale",
        "head/kernel",
    }


def test_transformer__initial_scale__residual_projections_are_smaller():
    blocks = make().blocks
    small = 0.3 / math.sqrt(2 * 3)
    for kernel, expected in (
        (blocks.attention.qkv.kernel, 0.3),
        (blocks.attention.out.kernel, small),
        (blocks.mlp.gate_up.kernel, 0.3),
        (blocks.mlp.down.kernel, small),
    ):
        # 1,440 entries or more: a standard deviation known to 1.9 %, so 3 sigma.
        assert abs(np.std(kernel[...]) / expected - 1) < 0.06


def test_transformer__bf16_compute__finite_and_close():
    ids = tokens(4)
    exact = logits_of(make(init_scale=0.1), ids)
    got = logits_of(make(init_scale=0.1, compute_dtype="bfloat16"), ids)
    assert got.dtype == exact.dtype == jnp.float32
    assert not np.array_equal(got, exact)
    # Measured over 8 seeds: at most 2.1 * 2**-9, a few roundings to 2**-9 in a row.
    assert_close(got, exact, 4 * 2.0**-9)


def test_transformer__bf16_compute__gradients_finite_and_close(unrolled):
    value, grads = loss_and_grads(make(compute_dtype="bfloat16"), tokens())
    # Measured over 8 seeds: at most 0.9 * 2**-9.
    assert abs(float(value) / float(unrolled[0]) - 1) < 2 * 2.0**-9
    for got, want in zip(
        jax.tree.leaves(grads), jax.tree.leaves(stack_blocks(unrolled[1])), strict=True
    ):
        # Measured over 8 seeds at this large init_scale: at most 0.053.
        assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


def test_transformer__bf16_params__norm_scales_stay_f32_and_gradients_follow():
    config = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "tied_head": False}
    model = nnx.eval_shape(lambda: make(**config))
    graphdef, params = nnx.split(model)
    grads = jax.eval_shape(jax.grad(lambda p: mean_loss(nnx.merge(graphdef, p), tokens())), params)
    dtypes = jax.tree.map(lambda g: g.dtype.name, nnx.to_pure_dict(nnx.as_pure(grads)))
    assert dtypes["blocks"]["attention_norm"]["scale"] == "float32"
    assert dtypes["blocks"]["mlp"]["down"]["kernel"] == "bfloat16"
    assert dtypes["embedding"]["embedding"] == dtypes["head"]["kernel"] == "bfloat16"


class CountingDot(nnx.Module):
    """Stands for a quantized dot: holds a Variable and writes what it saw to a Ref."""

    def __init__(self, sink, layers):
        self.observe = lambda amax: sink.__setitem__(..., jnp.maximum(sink[...], amax))
        self.scale = nnx.Variable(jnp.ones(layers))

    def __call__(self, lhs, rhs, dims, precision=None, **kwargs):
        self.observe(jnp.abs(lhs).max())
        scaled = lhs * self.scale[...]
        return jax.lax.dot_general(scaled, rhs, dims, precision=precision, **kwargs)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_transformer__dot_general_replaced_by_module__is_used_in_every_layer(remat):
    ids = tokens()

    @compiled
    def run(ids):
        sink = jax.new_ref(jnp.zeros(()))
        model = make(remat=remat)
        plain = model(ids)
        model.blocks.mlp.down.dot_general = nnx.data(CountingDot(sink, SMALL.num_layers))
        same = model(ids)
        model.blocks.mlp.down.dot_general.scale[...] = jnp.array([1.0, 1.0, 0.0])
        return plain, same, model(ids), sink[...]

    plain, same, last_layer_off, seen = run(ids)
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(last_layer_off - plain).max() > 1e-3
    assert float(seen) > 0


def test_transformer__one_tiny_batch__is_learnt_by_heart():
    model = make(init_scale=0.05, num_layers=1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    ids = tokens(4, 9)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: mean_loss(m, ids))(model)
        optimizer.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        losses = [float(step(model, optimizer)) for _ in range(100)]
    assert abs(losses[0] - math.log(13)) < 0.2
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be positive"),
        ({"rope_base": float("nan")}, "rope_base is nan"),
        ({"width": 20}, "width 20 over num_heads 4.*multiple of 8"),
        ({"num_kv_heads": 3}, r"num_kv_heads 3 does not divide num_heads 4.*\[1, 2, 4\]"),
        ({"mlp": "relu"}, "mlp is 'relu'; use one of 'swiglu', 'gelu'"),
        ({"remat": "some"}, "remat is 'some'.*'none', 'full', 'dots'"),
        ({"compute_dtype": "bf16"}, "compute_dtype is 'bf16'.*'bfloat16'"),
        ({"param_dtype": "float64"}, "param_dtype is 'float64'.*'float32'"),
    ],
)
def test_config__impossible_value__raises_with_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
