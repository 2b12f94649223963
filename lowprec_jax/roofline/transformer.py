"""The work of the reference transformer on one chip of a mesh, from abstract parameters.

Public names: `Run`, `layers_of`, `attention_of`, `residuals_of`, `memory_of`; of kernels
`Kernel`, `kernels_of`, `by_path`, `split_dimension`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lowprec_jax.models import Transformer, TransformerConfig, next_token_loss
from lowprec_jax.nnx import quantize
from lowprec_jax.recipes import NONE, Recipe, Rule, assign
from lowprec_jax.roofline.communication import REDUCE_BYTES, MeshShape
from lowprec_jax.roofline.gemm import Cost, Rates, Shape, gemm_cost
from lowprec_jax.roofline.layer import HIGH_BYTES, LayerWork
from lowprec_jax.roofline.memory import Residuals, residuals
from lowprec_jax.sharding import FSDP_AXIS, TENSOR_AXIS, dimension_over

__all__ = [
    "Kernel",
    "Run",
    "attention_of",
    "by_path",
    "kernels_of",
    "layers_of",
    "memory_of",
    "residuals_of",
    "split_dimension",
]

Tree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """What is planned.

    Attributes:
      sizes: the model.
      rules: which layers follow which recipe, as the chip executes them.
      mesh: sizes of the mesh axes.
      windows: windows of a micro-batch on one chip.
      micro_batches: micro-batches of a step.
      reduce: type in which gradients are summed, a key of `REDUCE_BYTES`.
      zero1: masters and moments are split over ``data``.
      sequence: the residual stream is split over ``tensor``.
    """

    sizes: TransformerConfig
    rules: tuple[Rule, ...]
    mesh: MeshShape
    windows: int
    micro_batches: int = 1
    reduce: str = "float32"
    zero1: bool = False
    sequence: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one chip."""
        return self.windows * self.sizes.max_context

    def casts_again(self, path: str) -> bool:
        """Whether the operands of a layer are made again in the backward pass."""
        return self.sizes.remat == "full" and path.startswith("blocks/")

    def product_again(self, path: str) -> bool:
        """Whether its product is computed again: nothing needs the result of a block's last one.

        Unless there is a norm behind it, as in unit-scaled models.
        """
        last = path.endswith("mlp/down") and self.sizes.parametrization == "standard"
        return self.casts_again(path) and not last


def layers_of(run: Run, params: Tree) -> tuple[LayerWork, ...]:
    """The linear layers, equal ones of an unrolled stack together.

    Args:
      run: what is planned.
      params: abstract parameters with their shardings.
    """
    kernels = kernels_of(run, params)
    counted: dict[LayerWork, int] = defaultdict(int)
    for a in assign(kernels, run.rules):
        kernel = kernels[a.path]
        name = re.sub(r"^blocks/\d+/", "blocks/*/", a.path)
        again = run.casts_again(a.path), run.product_again(a.path)
        shape = kernel.gemm(run)
        work = LayerWork(name, shape, 0, a.recipe, a.reason, kernel.itemsize, *again)
        counted[work] += kernel.layers * run.micro_batches
    layers = [dataclasses.replace(work, calls=calls) for work, calls in counted.items()]
    if run.sizes.tied_head:
        shape = Shape(run.tokens, run.sizes.width, run.sizes.vocab_size)
        width = jnp.dtype(run.sizes.param_dtype).itemsize
        layers.append(LayerWork("head", shape, run.micro_batches, NONE, "the embedding", width))
    return tuple(layers)


class Kernel(NamedTuple):
    """Kernels of a linear layer, or of a stack of them, on one chip when fsdp has gathered them.

    Attributes:
      layers: layers of the stack.
      shape: ``(inputs, *outputs)`` of one layer, its part under tensor parallelism.
      fsdp: dimension of `shape` that fsdp splits, or None.
      tensor: dimension of `shape` that was split, or None.
      itemsize: bytes of an element.
    """

    layers: int
    shape: tuple[int, ...]
    fsdp: int | None
    tensor: int | None
    itemsize: int

    def gemm(self, run: Run) -> Shape:
        """The forward GEMM of a micro-batch."""
        inputs, *outputs = self.shape
        return Shape(run.tokens, inputs, math.prod(outputs))


def kernels_of(run: Run, params: Tree) -> dict[str, Kernel]:
    """The kernels of the linear layers, by the path of the layer."""
    found = {}
    for name, x in by_path(params).items():
        if name.endswith("/kernel"):
            lead = int(run.sizes.scan_layers and name.startswith("blocks/"))
            fsdp, tensor = (split_dimension(x, axis) for axis in (FSDP_AXIS, TENSOR_AXIS))
            parts = [run.mesh.tensor if d == tensor else 1 for d in range(x.ndim)]
            shape = [n // part for n, part in zip(x.shape, parts, strict=True)]
            found[name.removesuffix("/kernel")] = Kernel(
                shape[0] if lead else 1,
                tuple(shape[lead:]),
                None if fsdp is None else fsdp - lead,
                None if tensor is None else tensor - lead,
                x.dtype.itemsize,
            )
    return found


def by_path(tree: Tree) -> dict[str, Any]:
    """Leaves by their paths, parts joined by ``/``."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}


def split_dimension(x: jax.ShapeDtypeStruct, axis: str) -> int | None:
    """The dimension of an abstract array that a mesh axis splits."""
    return dimension_over(x.sharding.spec, axis) if isinstance(x.sharding, NamedSharding) else None


def attention_of(run: Run, rates: Rates) -> Cost:
    """Scores and values, all T x T of them as the model computes them, forward and backward.

    In bf16, with f32 scores. The heads are split over ``tensor``.
    """
    sizes, length = run.sizes, run.sizes.max_context
    speed = rates.flops(16), rates.bytes
    scores = gemm_cost(Shape(length, sizes.head_dim, length), HIGH_BYTES, HIGH_BYTES, 4, *speed)
    values = gemm_cost(
        Shape(length, length, sizes.head_dim), HIGH_BYTES, HIGH_BYTES, HIGH_BYTES, *speed
    )
    heads = sizes.num_layers * sizes.num_heads * run.windows * run.micro_batches / run.mesh.tensor
    return (scores + values).times(3 * heads)


def residuals_of(run: Run, *, remat: str | None = None) -> Residuals:
    """What the forward pass keeps, from a trace of the model; scales do not come from sinks in it.

    Args:
      run: what is planned.
      remat: in place of that of the model.
    """
    sizes = dataclasses.replace(run.sizes, remat=remat or run.sizes.remat)
    rules = [
        dataclasses.replace(rule, recipe=_without_sinks(recipe))
        for rule in run.rules
        if isinstance(recipe := rule.recipe, Recipe)
    ]
    model = nnx.eval_shape(lambda: quantize(Transformer(sizes, rngs=nnx.Rngs(0)), rules))
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    def loss(given, tokens):
        model = nnx.merge(graphdef, given, others_of(others))
        return next_token_loss(model(tokens), tokens)[0]

    def others_of(abstract):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)

    def batch(windows):
        return (jax.ShapeDtypeStruct((windows, sizes.max_context), jnp.int32),)

    return residuals(loss, params, batch, sizes.width)


def _without_sinks(recipe: Recipe) -> Recipe:
    if not recipe.quantizes:
        return recipe
    return dataclasses.replace(recipe, scaling="current", observe=False)


def memory_of(
    run: Run, params: Tree, held: Mapping[str, float], kept: Residuals, unrolled: Residuals
) -> dict[str, float]:
    """Bytes on one chip at the height of the backward pass, by what they are for.

    Args:
      run: what is planned.
      params: abstract parameters with their shardings.
      held: bytes of the parts of the training state, by their names in it.
      kept: from `residuals_of`.
      unrolled: the same without recomputation.
    """
    tensor, weights = run.mesh.tensor, run.mesh.fsdp * run.mesh.tensor
    logits = 4.0 * run.tokens * run.sizes.vocab_size
    block = 0.0
    if run.sizes.remat == "full":  # one block at a time keeps what it needs
        whole = unrolled.part(run.windows, tensor, weights, sequence=run.sequence)
        block = whole / run.sizes.num_layers
    whole_kernel = 0.0
    if run.mesh.fsdp > 1:  # one at a time, in bf16 at most, and its gradient before it is scattered
        each = HIGH_BYTES + REDUCE_BYTES[run.reduce]
        whole_kernel = each * max(math.prod(k.shape) for k in kernels_of(run, params).values())
    return {
        "parameters": held["params"] + held["ema"],
        "optimizer": held["opt_state"],
        "gradients": held["params"],
        "scaling": held["scaling"] + held["reduction"],
        "kept": kept.part(run.windows, tensor, weights, sequence=run.sequence),
        "working": logits + block + whole_kernel,
    }
