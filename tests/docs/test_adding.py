"""docs/adding.md: its program runs, and what it adds does what the page says."""

import dataclasses
import functools
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from recipes.test_conformance import check_gradient, check_round_trip

import lowprec_jax as lp
from lowprec_jax import numerics, ops
from lowprec_jax.cli.main import main
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import get_recipe, get_target, recipes, targets

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
DIMS = (((1,), (0,)), ((), ()))
# The modules: `numerics.formats` is a function.
REGISTRIES = [
    importlib.import_module(f"lowprec_jax.{name}")
    for name in ("numerics.formats", "recipes.registry", "recipes.target")
]


def registered():
    names = ([x.name for x in known()] for known in (numerics.formats, recipes, targets))
    return (*names, list(ops.BACKENDS), len(REGISTRIES[1]._FAMILIES))


@pytest.fixture(scope="module")
def page():
    """The names that the program of the page leaves; its registrations end with this module."""
    before = registered()
    with pytest.MonkeyPatch.context() as patch:
        for module in REGISTRIES:
            patch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
        patch.setattr(REGISTRIES[1], "_FAMILIES", list(REGISTRIES[1]._FAMILIES))
        patch.setitem(ops.BACKENDS, "in_f32", None)  # to be taken out again at the end
        del ops.BACKENDS["in_f32"]
        names: dict = {"__name__": "adding"}
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"docs/adding.md, block {number}", "exec"), names)
        yield names
    assert registered() == before


def e2m2_values():
    """Every value of the page's format, from its definition."""
    normal = [2.0 ** (e - 1) * (1 + m / 4) for e in (1, 2, 3) for m in range(4)]
    positive = np.array([m / 4 for m in range(4)] + normal)
    return np.unique(np.concatenate([-positive, positive]))


def integers(seed, *shape):
    """Small integers, which e2m2 holds exactly under any power of two that its rows may need."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def test_page__links_and_paths__exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    headings = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    paths = re.findall(r"`((?:lowprec_jax|tests)/[\w./]+)`", PAGE)
    assert len(links) > 5
    assert len(paths) > 5
    assert all(link in anchors or (ROOT / "docs" / link).is_file() for link in links)
    assert all((ROOT / path).exists() for path in paths)


def test_page__tables_that_are_private__are_where_it_says():
    named = re.findall(r"`(_[A-Z]+)`[^`]+`(lowprec_jax/[\w./]+)`", PAGE)
    named += re.findall(r"`(_[A-Z]+_[A-Z]+)` in `(lowprec_jax/[\w./]+)`", PAGE)
    assert {name for name, _ in named} == {"_KINDS", "_SLOTS", "_STOCK_OPS"}
    for name, path in named:
        assert f"\n{name}" in (ROOT / path).read_text(encoding="utf-8")


def test_format__every_code_and_midpoint__is_that_of_the_definition(page):
    values, fmt = e2m2_values(), page["E2M2"]
    codes = jnp.arange(2**fmt.bits, dtype=jnp.uint8)
    np.testing.assert_array_equal(np.unique(numerics.decode(codes, fmt)), values)
    x = np.random.default_rng(0).uniform(-7, 7, 200).astype(np.float32)
    nearest = values[np.abs(x[:, None] - values).argmin(1)]
    np.testing.assert_array_equal(numerics.decode(numerics.cast(jnp.asarray(x), fmt), fmt), nearest)


@pytest.mark.usefixtures("page")
def test_format_and_chip__command_formats__shows_them(capsys):
    assert main(["formats", "e2m2", "ternary", "e3m4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "e2m2 5 e2m2, bias 1 7 1 2^-2 2^-2 -0 emulated only" in shown
    assert "ternary 2 table of 3 1 " in shown
    assert re.search(r"e3m4 8 [^ ]+ bias 3 .*my-chip", shown)


@pytest.mark.parametrize("name", ["fp5_rowwise", "fp5_block16"])
@pytest.mark.usefixtures("page")
def test_recipe__of_the_page__passes_checks_of_the_conformance_suite(name):
    check_gradient(get_recipe(name))
    check_round_trip(get_recipe(name))


@pytest.mark.usefixtures("page")
def test_recipe__of_the_page__is_listed_and_the_family_is_not():
    names = [recipe.name for recipe in recipes()]
    assert names[-1] == "fp5_rowwise"
    assert not [name for name in names if name.startswith("fp5_block")]
    with pytest.raises(UserError, match=r"Known: .*fp5_rowwise.*fp5_block<n>"):
        get_recipe("fp5_block0")


@pytest.mark.usefixtures("page")
def test_recipe__of_the_page__is_the_exact_product_under_jit_and_scan():
    recipe = dataclasses.replace(get_recipe("fp5_rowwise"), scale_rounding="power_of_two")
    xs, ws, cs = integers(0, 3, 6, 8), integers(1, 3, 8, 5), integers(2, 3, 6, 5)

    def gradients(x, w, c):
        out, pull = jax.vjp(lambda x, w: ops.dot_general(x, w, DIMS, recipe=recipe), x, w)
        return out, *pull(c)

    data = tuple(map(jnp.asarray, (xs, ws, cs)))
    scan = jax.jit(lambda data: lax.scan(lambda _, one: (None, gradients(*one)), None, data)[1])
    step = jax.jit(gradients)
    steps = [step(*one) for one in zip(*data, strict=True)]
    expected = xs @ ws, cs @ ws.mT, xs.mT @ cs  # sums of 8 products of at most 16: exact
    for result in (scan(data), jax.tree.map(lambda *parts: jnp.stack(parts), *steps)):
        for ours, exact in zip(result, expected, strict=True):
            np.testing.assert_array_equal(ours, exact)


def test_recipe__training__falls_and_its_layers_have_the_recipe(page):
    assert page["losses"][-1] < 0.5 * page["losses"][0]
    assert [layer.dot_general.recipe for _, layer in lp.nnx.layers(page["model"])] == [
        page["FP5_ROWWISE"]
    ] * 2


def test_layer__nnx_and_linen__are_the_same_numbers_and_observe(page):
    layer, x = page["layer"], 0.7 * page["inputs"]  # scales are those of the whole inputs
    linen = page["LinenMaxout"](4, 3)
    variables = jax.jit(linen.init)(jax.random.key(0), x)
    variables = {**variables, "params": {"kernel": layer.kernel[...]}}
    site = variables[lp.linen.OVERWRITE_WITH_GRADIENT]["EinsumOp_0"]["scaling"]
    site |= lp.nnx.scaling_state(layer)["product"]
    np.testing.assert_array_equal(jax.jit(linen.apply)(variables, x), nnx.jit(layer)(x))

    history = lp.nnx.scaling_state(layer)["product"]["amax_history"]
    seen = page["inputs"], layer.kernel[...], jnp.ones(())  # d sum / d out is 0 or 1
    amaxes = [jnp.abs(tensor).max() for tensor in seen]
    np.testing.assert_array_equal(history[:, 0], jnp.array(amaxes))


def test_layer__with_a_call_site__is_not_reached_by_quantize(page):
    model = nnx.Sequential(page["block"], page["layer"])
    recipe = page["layer"].product.recipe
    lp.nnx.quantize(model, "fp5_rowwise")
    assert [path for path, _ in lp.nnx.layers(model)] == ["layers/0/layers/0"]
    assert page["layer"].product.recipe == recipe
    assert lp.nnx.plan(model, "fp5_rowwise", page["inputs"]).rows[-1].reason == "not reachable"


def test_backend__in_a_recipe__computes_all_three_matmuls(page, monkeypatch):
    calls = []

    def counted(*operands, **options):
        calls.append(options["formats"])
        return page["in_f32"](*operands, **options)

    monkeypatch.setitem(ops.BACKENDS, "in_f32", counted)
    x, w = jnp.asarray(integers(3, 6, 8)), jnp.asarray(integers(4, 8, 5))
    base = dataclasses.replace(get_recipe("fp8_rowwise"), scale_rounding="power_of_two")

    def gradients(backend):
        recipe = dataclasses.replace(base, backend=backend)
        product = functools.partial(ops.dot_general, dimension_numbers=DIMS, recipe=recipe)
        return jax.jit(jax.grad(lambda x, w: product(x, w).sum(), (0, 1)))(x, w)

    ours, upcast = gradients("in_f32"), gradients("upcast")
    assert calls == [(numerics.E4M3FN, numerics.E4M3FN)] * 3
    jax.tree.map(np.testing.assert_array_equal, ours, upcast)


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize(("recipe", "depth"), [("fp5_block16", 16), ("fp5_rowwise", 32)])
def test_backend__scales_of_rows_and_blocks__is_asked_for_what_shares_a_scale(
    monkeypatch, recipe, depth
):
    asked = []

    def noting(left, right, *operands, **options):
        asked.append(left.shape[-1])
        return ops.BACKENDS["upcast"](left, right, *operands, **options)

    monkeypatch.setitem(ops.BACKENDS, "in_f32", noting)

    def product(x, w):
        return ops.dot_general(x, w, DIMS, recipe=recipe, backend="in_f32")

    shapes = jax.ShapeDtypeStruct((4, 32), jnp.float32), jax.ShapeDtypeStruct((32, 4), jnp.float32)
    assert jax.eval_shape(product, *shapes).shape == (4, 4)
    assert set(asked) == {depth}


@pytest.mark.usefixtures("page")
def test_chip__of_the_page__maps_amaxes_onto_its_own_largest_value():
    recipe, _ = lp.recipes.translate("fp8_current", "my-chip")
    assert float(recipe.scale(lp.recipes.Role.LHS, jnp.float32(15.5))) == 1.0  # e3m4: 15.5
    assert get_target("my-chip") in targets()
