"""Memory of one gradient step: what XLA allocates, what the backward pass keeps, what state costs.

    python -m benchmarks.memory [--layers 8] [--width 512] [--tokens 4096]

The model is a scanned stack of residual MLPs, Dense, GELU, Dense, all of one width, in bf16 with
f32 parameters; nothing runs, the programs are compiled and read.

"temp MiB" is what the program holds beside its arguments and results, from XLA's
``memory_analysis()``. "kept MiB" is what leaves the forward pass for the backward pass as JAX
traces it, arguments among it; XLA may recompute or share some. "state" is the scaling state, in
bytes per parameter and in all.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import lowprec_jax as lp
from benchmarks.machine import use_allocator
from benchmarks.peers.linen import available, dot_general_cls, qwix_provider
from benchmarks.timing import report, section_parser

MIB = 2**20
STATE = lp.linen.OVERWRITE_WITH_GRADIENT
OURS = ("fp8_delayed", "fp8_current")
PEERS = ("flax direct", "flax qdq", "qwix fp8", "aqt fp8", "aqt int8")
CASES = ("bf16", "bf16, remat", *OURS, "fp8_delayed, remat", *PEERS)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = section_parser("memory", __doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args(words)
    code = use_allocator(options.allocator, "benchmarks.memory", words)
    if code is not None:
        return code
    x = jax.ShapeDtypeStruct((options.tokens, options.width), jnp.bfloat16)
    group = f"{options.layers} layers, width {options.width}, {options.tokens} tokens"
    names = [name for name in options.cases if name not in PEERS or available(name)]
    rows = [{"group": group, "case": n, **_measure(n, options.layers, x)} for n in names]
    report(options.json, rows)
    return 0


class Layer(nn.Module):
    op: Callable | None

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        def dense(y):
            return nn.Dense(x.shape[-1], dtype=x.dtype, dot_general_cls=self.op)(y)

        return x + dense(nn.gelu(dense(x))), None


class Stack(nn.Module):
    """Layers with parameters and scaling state of their own, run by one `lax.scan`."""

    layers: int
    op: Callable | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scan = nn.scan(
            layer,
            variable_axes={"params": 0, STATE: 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return scan(self.op)(x, None)[0]


def _stack(case: str, layers: int) -> nn.Module:
    name, _, remat = case.partition(", ")
    if name == "qwix fp8":
        return importlib.import_module("qwix").quantize_model(Stack(layers), qwix_provider())
    if name == "bf16":
        op = None
    else:
        op = lp.linen.dot_general_cls(name) if name in OURS else dot_general_cls(name)
    return Stack(layers, op, bool(remat))


def _measure(case: str, layers: int, x: Any) -> dict[str, Any]:
    model = _stack(case, layers)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(variables, x):
        return jnp.square(model.apply(variables, x).astype(jnp.float32)).mean()

    is_ours = case.partition(", ")[0] in OURS
    gradients = lp.linen.value_and_grad(loss) if is_ours else jax.grad(loss)
    memory = jax.jit(gradients).lower(variables, x).compile().memory_analysis()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    state_bytes = _bytes(variables.get(STATE, {}))
    return {
        "temp MiB": memory.temp_size_in_bytes / MIB if memory else None,
        "kept MiB": _kept(loss, variables, x) / MIB,
        "parameters": parameters,
        "state bytes": state_bytes,
        "state B/parameter": state_bytes / parameters,
    }


def _kept(loss: Callable, variables: Any, x: Any) -> int:
    """Bytes that the forward pass hands to the backward pass."""
    found = []

    def forward(variables, x):
        scaling = variables.get(STATE, {})
        others = {STATE: lp.state.make_sinks(scaling)} if lp.state.sites(scaling) else {}

        def of_params(params):
            return loss({**variables, **others, "params": params}, x)

        value, pull = jax.vjp(of_params, variables["params"])
        found.append(_bytes(pull))
        return value

    jax.eval_shape(forward, variables, x)
    return found[0]


def _bytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


if __name__ == "__main__":
    sys.exit(main())
