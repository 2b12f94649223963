"""Sharding rules: which dimension is split over what, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from training.helpers import network_of, tiny_config

from lowprec_jax.errors import UserError
from lowprec_jax.models import partitioning
from lowprec_jax.sharding import ShardingRule, dimension_over, make_mesh, partition_specs
from lowprec_jax.sharding.rules import only, split_further

MESH = make_mesh(2, 2, 2)


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_partition_specs__trailing_dimensions__are_split_and_leading_ones_are_not():
    params = {"block": {"kernel": shaped(3, 8, 4), "scale": shaped(8)}, "kernel": shaped(8, 4)}
    specs = partition_specs(params, [ShardingRule("kernel$", ("fsdp", "tensor"))], MESH)
    assert specs["block"]["kernel"] == P(None, "fsdp", "tensor")
    assert specs["kernel"] == P("fsdp", "tensor")
    assert specs["block"]["scale"] == P()


def test_partition_specs__first_match__wins():
    rules = [ShardingRule("a/kernel", (None, "fsdp")), ShardingRule("kernel", ("fsdp", None))]
    specs = partition_specs({"a": {"kernel": shaped(4, 4)}, "kernel": shaped(4, 4)}, rules, MESH)
    assert (specs["a"]["kernel"], specs["kernel"]) == (P(None, "fsdp"), P("fsdp", None))


def test_partition_specs__axes_that_the_mesh_has_not__split_nothing():
    rules = [ShardingRule("k", (("fsdp", "expert"), "tensor"))]
    assert partition_specs({"k": shaped(4, 4)}, rules, make_mesh(1, 2)) == {"k": P("fsdp", None)}
    assert partition_specs({"k": shaped(3, 5)}, rules, make_mesh(8)) == {"k": P()}


def test_partition_specs__two_axes_on_one_dimension__multiply():
    rules = [ShardingRule("k", (("fsdp", "tensor"),))]
    assert partition_specs({"k": shaped(8)}, rules, MESH) == {"k": P(("fsdp", "tensor"))}
    with pytest.raises(
        UserError, match=r"Dimension 0 of k has size 6, .* 'fsdp' x 'tensor' of siz"
    ):
        partition_specs({"k": shaped(6)}, rules, MESH)


def test_partition_specs__axis_used_twice__names_parameter_axis_and_dimensions():
    rules = [ShardingRule("k", ("fsdp", "fsdp"))]
    with pytest.raises(UserError, match=r"'fsdp' for dimensions 1 and 2 of layer/k; an axis"):
        partition_specs({"layer": {"k": shaped(3, 4, 4)}}, rules, MESH)


def test_partition_specs__size_that_does_not_divide__names_both():
    rules = [ShardingRule("k", (None, "tensor"))]
    with pytest.raises(UserError, match=r"Dimension 1 of k has size 5, .* 'tensor' of size 2 does"):
        partition_specs({"k": shaped(4, 5)}, rules, MESH)


def test_partition_specs__more_axes_than_dimensions__is_refused():
    with pytest.raises(UserError, match=r"names 2 dimensions, but k has shape \(4,\)"):
        partition_specs({"k": shaped(4)}, [ShardingRule("k", ("fsdp", None))], MESH)


def test_only__some_axes__leaves_the_rest_out():
    assert only(P(("fsdp", "tensor"), None, "data"), ("data", "fsdp")) == P("fsdp", None, "data")


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (P(), (3, 8), P(None, "data")),
        (P("fsdp", None), (4, 8), P(("fsdp", "data"), None)),
        (P("fsdp", None), (2, 8), P("fsdp", "data")),
        (P(), (3, 5), P()),
        (P("data"), (4,), P("data")),
        (P(), (), P()),
    ],
)
def test_split_further__first_dimension_that_divides__is_split(spec, shape, expected):
    assert split_further(spec, shape, "data", MESH) == expected


def test_dimension_over__axis__is_found_in_tuples_too():
    assert dimension_over(P(None, ("fsdp", "data")), "data") == 1
    assert dimension_over(P(None, "fsdp"), "data") is None


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_transformer_table__every_matrix__is_split_over_fsdp(scan):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    model = {"scan_layers": scan, "tied_head": False}
    specs = network_of(tiny_config(mesh=mesh, model=model, batch_size=8)).layout.specs
    flat = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    split = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, s in flat if "fsdp" in str(s)
    }
    names = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat}
    assert split == {name for name in names if not name.endswith("scale")}
    assert len(partitioning.TRANSFORMER) == 7
