"""What a program communicates, against counts and bytes by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax.ops import collectives, count_gemms, format_collectives, stablehlo_collectives
from lowprec_jax.ops.collectives import Collective, Tensor

N = 8


def mesh(shape=(N,), names=("d",)):
    axis_types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=jax.devices()[:N])


SPLIT = P("d")


def lowered(f, *args, in_specs=SPLIT, out_specs=SPLIT, over=None):
    mapped = jax.shard_map(f, mesh=over or mesh(), in_specs=in_specs, out_specs=out_specs)
    return jax.jit(mapped).lower(*args)


def both(f, *args, **specs):
    """The report before XLA and after it, which must agree (XLA may split operands)."""
    program = lowered(f, *args, **specs)
    before, after = stablehlo_collectives(program), collectives(program.compile())
    assert [summary(c) for c in before] == [summary(c) for c in after]
    return after


def summary(c: Collective):
    return c.kind, c.dtype, c.group_size, c.executed, c.exact, c.payload_bytes, c.wire_bytes


def only(found) -> Collective:
    (collective,) = found
    return collective


def test_collectives__sum_of_a_tree__is_one_all_reduce_of_many_operands():
    tree = {"a": jnp.ones((N, 32)), "b": jnp.ones((N, 3))}
    program = lowered(lambda t: lax.psum(t, "d"), tree, out_specs=P())
    found = only(collectives(program.compile()))
    assert found.kind == "all-reduce"
    assert sorted(found.operands) == [Tensor("f32", (1, 3)), Tensor("f32", (1, 32))]
    assert sorted(found.results) == sorted(found.operands)
    assert (found.group_size, found.executed, found.exact) == (N, 1, True)
    assert found.payload_bytes == 4 * 35
    assert found.wire_bytes == 2 * 7 / 8 * 4 * 35
    assert len(stablehlo_collectives(program)) == 2


def gather_and_add(x, _=None):
    return x + lax.all_gather(x, "d", tiled=True).sum(), None


def test_collectives__all_gather_in_a_scan__is_executed_once_per_trip():
    found = only(both(lambda x: lax.scan(gather_and_add, x, length=5)[0], jnp.ones((N, 4))))
    assert (found.kind, found.executed, found.exact) == ("all-gather", 5, True)
    assert found.results == (Tensor("f32", (N, 4)),)
    assert found.payload_bytes == 5 * N * 4 * 4
    assert found.wire_bytes == 5 * 7 / 8 * N * 4 * 4


def test_collectives__nested_scans__are_multiplied():
    def outer(x, _):
        return lax.scan(gather_and_add, x, length=5)[0], None

    found = only(both(lambda x: lax.scan(outer, x, length=3)[0], jnp.ones((N, 4))))
    assert found.executed == 15


@pytest.mark.parametrize(
    ("f", "kind", "payload", "wire"),
    [
        (lambda x: lax.psum_scatter(x, "d", tiled=True), "reduce-scatter", 1024, 896),
        (lambda x: lax.all_to_all(x, "d", 0, 0, tiled=True), "all-to-all", 1024, 896),
        (lambda x: lax.all_to_all(x, "d", 1, 0, tiled=True), "all-to-all", 1024, 896),
        (lambda x: lax.ppermute(x, "d", [(0, 1), (1, 0)]), "collective-permute", 1024, 1024),
        (lambda x: lax.pmax(x, "d"), "all-reduce", 1024, 1792),
    ],
)
def test_collectives__each_kind__moves_its_ring_bytes(f, kind, payload, wire):
    out = P() if kind == "all-reduce" else P("d")
    program = lowered(f, jnp.ones((8 * N, 32)), out_specs=out)
    for found in (only(stablehlo_collectives(program)), only(collectives(program.compile()))):
        assert (found.kind, found.payload_bytes, found.wire_bytes) == (kind, payload, wire)
        assert found.group_size == (2 if kind == "collective-permute" else N)


def test_stablehlo_collectives__u8_gather__moves_half_of_bf16():
    def gather(dtype):
        x = jnp.ones((N, 32), dtype)
        program = lowered(
            lambda x: lax.all_gather(x, "d", to="invarying"), x, out_specs=P(None, None)
        )
        return only(stablehlo_collectives(program))

    codes, wide = gather(jnp.uint8), gather(jnp.bfloat16)
    assert (codes.dtype, wide.dtype) == ("u8", "bf16")
    assert (codes.wire_bytes, wide.wire_bytes) == (7 / 8 * N * 32, 7 / 8 * N * 64)


@pytest.mark.parametrize(("axes", "size"), [("a", 2), ("b", 4), (("a", "b"), 8)])
def test_collectives__over_axes_of_a_mesh__communicate_in_groups(axes, size):
    over = mesh((2, 4), ("a", "b"))
    left = tuple(axis for axis in ("a", "b") if axis not in axes)
    found = only(
        both(
            lambda x: lax.psum(x, axes),
            jnp.ones((8, 4)),
            in_specs=P(("a", "b")),
            out_specs=P(left or None),
            over=over,
        )
    )
    assert (found.group_size, found.payload_bytes) == (size, 16)


@pytest.mark.parametrize(
    ("spec", "size"), [("a", 2), ("b", 4), (("a", "b"), 8)], ids=["a", "b", "ab"]
)
def test_collectives__contraction_split_by_jit__is_the_all_reduce_that_xla_inserts(spec, size):
    over = mesh((2, 4), ("a", "b"))
    placed = [NamedSharding(over, P(None, spec)), NamedSharding(over, P(spec, None))]
    f = jax.jit(jnp.matmul, in_shardings=placed, out_shardings=NamedSharding(over, P()))
    program = f.lower(jnp.ones((16, 32)), jnp.ones((32, 8)))
    assert stablehlo_collectives(program) == []
    found = only(collectives(program.compile()))
    assert (found.kind, found.group_size, found.payload_bytes) == ("all-reduce", size, 16 * 8 * 4)


def test_collectives__none__is_empty():
    assert both(lambda x: x * 2, jnp.ones((N, 4))) == []


def test_collectives__branches__all_count_once_and_are_marked():
    def either(x):
        gather = lambda x: x + lax.all_gather(x, "d")[3]  # noqa: E731
        exchange = lambda x: lax.all_to_all(x, "d", 0, 0, tiled=True)  # noqa: E731
        return lax.cond(x.sum() > 0, gather, exchange, x)

    found = both(either, jnp.ones((8 * N, 4)))
    assert sorted((c.kind, c.executed, c.exact) for c in found) == [
        ("all-gather", 1, False),
        ("all-to-all", 1, False),
    ]


def test_collectives__loop_of_unknown_length__counts_once_and_is_marked():
    def settle(x):
        busy = lambda x: (lax.psum(x, "d") < 100.0).all()  # noqa: E731
        return lax.while_loop(busy, lambda x: x + lax.pmax(x, "d"), x)

    found = both(settle, jnp.ones((N, 4)))
    assert [(c.executed, c.exact) for c in found] == [(1, False), (1, False)]


def test_collectives__in_the_condition_of_a_counted_loop__run_once_more():
    def f(x):
        def busy(carry):
            i, x = carry
            lax.pmax(x, "d")
            return i < 11

        step = lambda c: (c[0] + 3, c[1] + lax.pmax(c[1], "d"))  # noqa: E731
        return lax.while_loop(busy, step, (jnp.int32(2), x))[1]

    # 2, 5, 8: three trips, four tests of the condition (whose unused pmax XLA drops).
    program = lowered(f, jnp.ones((N, 4)))
    assert sorted(c.executed for c in stablehlo_collectives(program)) == [3, 4]
    assert only(collectives(program.compile())).executed == 3


@pytest.mark.parametrize(
    ("busy", "start"), [(lambda i: i < 100.0, 0.0), (lambda i: i <= 11, 2)], ids=["float", "<="]
)
def test_count_gemms__loop_that_is_not_counted_by_an_integer_below_a_bound__counts_once(
    busy, start
):
    w = jnp.ones((4, 4))

    def loop(x):
        step = lambda carry: (carry[0] + 3, carry[1] @ w)  # noqa: E731
        return lax.while_loop(lambda carry: busy(carry[0]), step, (jnp.asarray(start), x))[1]

    assert count_gemms(jax.jit(loop).lower(w)).total == 1


HLO = """HloModule m, entry_computation_layout={(f32[4]{0})->f32[4]{0}}, num_partitions=16

%wrapped (p.1: f32[8]) -> f32[2] {
  %p.1 = f32[8]{0:T(8,128)} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p.1), replica_groups=[4,4]<=[2,4,2]T(1,0,2), to_apply=%add
}

ENTRY %main (p: f32[4], q: bf16[8]) -> f32[4] {
  %p = f32[4]{0:T(8,128)} parameter(0)
  %q = bf16[8]{0} parameter(1)
  %g = ((f32[4]{0}, bf16[8]{0}), (f32[8]{0}, /*index=1*/bf16[16]{0:T(8)})) \
all-gather-start(%p, %q), replica_groups={{0,1},{2,3}}
  %gd = (f32[8]{0}, bf16[16]{0}) all-gather-done(%g)
  %x = f32[8]{0} get-tuple-element(%gd), index=0
  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%wrapped
  %sd = f32[2]{0} async-done(%s), calls=%wrapped
  %c = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(f32[4]{0} %p), \
source_target_pairs={{0,0},{1,2}}
  %d = f32[4]{0} collective-permute-done(%c)
  %alone = f32[4]{0} all-reduce(%d), replica_groups={{0},{1}}, to_apply=%add
  %all = f32[4]{0} all-reduce(%alone), replica_groups={}, to_apply=%add
  ROOT %sub = f32[4]{0} all-reduce(%all), replica_groups=mesh['a'=4,'b'=4] {'a','b':(1)2}
}
"""


class Text:
    def __init__(self, text):
        self.text = text

    def as_text(self):
        return self.text


def test_collectives__asynchronous_pairs_and_all_forms_of_groups__are_read():
    # As GPU and TPU print them; XLA:CPU does not.
    found = collectives(Text(HLO))
    assert [(c.kind, c.group_size, c.payload_bytes, c.wire_bytes) for c in found] == [
        ("all-gather", 2, 64, 32),
        ("reduce-scatter", 4, 32, 24),
        ("collective-permute", 2, 16, 16),
        ("all-reduce", 1, 0, 0),
        ("all-reduce", 16, 16, 30),
        ("all-reduce", 8, 16, 28),
    ]
    assert found[0].dtype == "bf16+f32"
    assert found[0].results == (Tensor("f32", (8,)), Tensor("bf16", (16,)))
    assert found[2].results == (Tensor("f32", (4,)),)


LOOP = """HloModule m, num_partitions=2

%test (c: f32[4]) -> pred[] {
  %c = f32[4]{0} parameter(0)
  ROOT %t = f32[4]{0} all-reduce(%c), replica_groups={{0,1}}
}

%body (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %s = f32[4]{0} collective-permute(%b), source_target_pairs={{0,0},{1,1}}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %w = f32[4]{0} while(%p), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives__condition_of_a_compiled_loop__runs_once_more_than_its_body():
    tested, moved = collectives(Text(LOOP))
    assert (tested.kind, tested.executed, tested.exact) == ("all-reduce", 4, True)
    assert (moved.kind, moved.executed, moved.exact) == ("collective-permute", 3, True)
    # Every device keeps what it has.
    assert (moved.group_size, moved.wire_bytes) == (1, 0)


def test_collectives__text_that_is_no_program__is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY computation .* stablehlo_collectives"):
        collectives(Text("nothing"))


def test_tensor__packed_and_empty__bytes():
    assert [
        Tensor(*t).bytes for t in [("s4", (3,)), ("pred", (5,)), ("f8e4m3fn", ()), ("f32", (0,))]
    ] == [2, 5, 1, 0]


def test_format_collectives__groups_and_totals():
    operand = Tensor("u8", (1_000_000,))
    found = [
        Collective("all-to-all", (operand,), (operand,), 4, 2, True),
        Collective("all-to-all", (operand, operand), (operand, operand), 4, 1, True),
        Collective("all-reduce", (Tensor("f32", (250_000,)),), (), 2, 3, False),
    ]
    assert format_collectives(found).splitlines() == [
        "collective  dtype  executed  operands  payload MB  wire MB per device",
        "all-reduce  f32          ~3        ~3      ~3.000              ~3.000",
        "all-to-all  u8            3         4       4.000               3.000",
        "total                    ~6        ~7      ~7.000              ~6.000",
    ]
    assert format_collectives([]).splitlines()[1].split() == ["total", "0", "0", "0.000", "0.000"]
