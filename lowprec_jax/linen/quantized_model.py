"""Quantizes an existing Linen model without touching it: its layers are met while it runs.

`@nn.compact` models have no layers before they are called, so nothing can be replaced beforehand.
A method interceptor, active only inside calls of the wrapped model, fills the injection slot of
each layer for the time of that layer's call.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lowprec_jax.errors import UserError
from lowprec_jax.linen.conv import conv_general_dilated_cls
from lowprec_jax.linen.dot_general import dot_general_cls
from lowprec_jax.linen.modules import apply_einsum
from lowprec_jax.recipes import Recipe, Rules, as_rules, assign


class Layer(NamedTuple):
    """A layer that can be quantized.

    Attributes:
      path: module path, components joined by ``/``; empty if the model itself is the layer.
      kind: "Dense", "DenseGeneral", "Conv" or "Einsum".
      kernel_shape: shape of the kernel, of one layer where a scan stacks them.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...]


class Quantized(nn.Module):
    """A model whose layers compute as rules say; made by `quantize`.

    It has the parameter tree, the initial values, the methods and the attributes of `model`.

    Attributes:
      model: the model, unmodified.
      rules: which layer gets which recipe, normalised.
    """

    model: nn.Module
    rules: tuple

    # nowrap: for Flax, the only module that is called is `model`, on the scope of this one.
    @nn.nowrap
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model.

        Raises:
          UserError: a rule matches no layer.
        """
        return self.run_method("__call__", *args, **kwargs)

    @nn.nowrap
    def run_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the model, given its name."""
        model = self._placed_model()
        if model.scope is None:
            return getattr(model, name)(*args, **kwargs)  # Flax's error for unbound modules
        met: set[str] = set()
        with nn.intercept_methods(_quantizing(model.path, self.rules, met)):
            out = getattr(model, name)(*args, **kwargs)
        if not model.is_initializing():
            met |= _paths_of_parameters(model.variables.get("params", {}))
            assign(sorted(met), self.rules)
        elif name == "__call__":
            assign(sorted(met), self.rules)
        return out

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`; `method` may be one of the model's."""
        return super().apply(variables, *args, method=self._entry(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `flax.linen.Module.init_with_output`; `method` may be one of the model's."""
        return super().init_with_output(rngs, *args, method=self._entry(method), **kwargs)

    @nn.nowrap
    def _placed_model(self) -> nn.Module:
        """The model in the place of this module; where it is if it has a place of its own."""
        if self.scope is None or self.model.parent is not self:
            return self.model
        return _moved(self.model, self.scope.rewound())

    @nn.nowrap
    def _entry(self, method: Any) -> Callable | None:
        """A method of the model as one that Flax can call on this module."""
        name = method if isinstance(method, str) else getattr(method, "__name__", "")
        function = getattr(method, "__func__", method)
        known = getattr(type(self.model), name, None) is function
        if method is None or not (known or isinstance(method, str)):
            return method
        return lambda module, *args, **kwargs: module.run_method(name, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "model" not in self.__dict__:
            return super().__getattr__(name)
        value = getattr(self._placed_model(), name)
        if callable(value) and hasattr(type(self.model), name):
            return functools.partial(self.run_method, name)
        return value


def quantize(model: nn.Module, rules: Rules) -> Quantized:
    """A model that computes the layers of `model` as rules say.

    Parameter tree and initial values are those of `model`, bit for bit; scaling state is a
    collection of its own. Reached are `nn.Dense`, `nn.DenseGeneral` (so the projections of stock
    attention), `nn.Conv` and `nn.Einsum`; a layer with a `dot_general` or `conv_general_dilated` of
    its own keeps it. A delayed recipe inside `nn.scan` or `nn.vmap` needs `OVERWRITE_WITH_GRADIENT`
    among its variable axes.

    Args:
      model: any Linen model, not bound.
      rules: a recipe, its name, or patterns on module paths; see `lowprec_jax.recipes.as_rules`.

    Returns:
      A module to use in place of `model`. A rule that matches no layer is an error of its first
      call.

    Raises:
      UserError: an unknown recipe, a bad pattern, or a model that is quantized already.
    """
    if isinstance(model, Quantized):
        raise UserError("quantize: the model is quantized already; quantize `model.model` instead.")
    return Quantized(model=model, rules=as_rules(rules))


def layers(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[Layer]:
    """The layers of a model that `quantize` can reach, in the order in which they run.

    Traces the initialisation of the model; computes nothing.

    Args:
      model: a model, quantized or not.
      *inputs: what it is called with; shapes suffice (`jax.ShapeDtypeStruct`).
      **kwargs: static arguments of the call.
    """
    model = model.model if isinstance(model, Quantized) else model
    found: dict[str, Layer] = {}

    def record(next_fun, args, call_kwargs, context):
        out, kind = next_fun(*args, **call_kwargs), _kind_of(context)
        if kind:
            path = "/".join(context.module.path)
            kernel = nn.meta.unbox(context.module.variables["params"]["kernel"])
            found.setdefault(path, Layer(path, kind, tuple(kernel.shape)))
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(lambda *xs: model.init(jax.random.key(0), *xs, **kwargs), *inputs)
    return list(found.values())


def _moved(module: nn.Module, parent: Any) -> nn.Module:
    """A copy of a module in another place, with the submodules it owns; borrowed ones stay."""

    def is_module(x: Any) -> bool:
        return isinstance(x, nn.Module)

    def move(x: Any) -> Any:
        return _moved(x, None) if is_module(x) and x.parent is module else x

    names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    fields = {name: getattr(module, name) for name in names}
    fields = {
        name: jax.tree.map(move, value, is_leaf=is_module)
        for name, value in fields.items()
        if any(map(is_module, jax.tree.leaves(value, is_leaf=is_module)))
    }
    return module.clone(parent=parent, **fields)


def _quantizing(prefix: tuple[str, ...], rules: tuple, met: set[str]) -> Callable:
    """An interceptor that quantizes layers and adds their paths below `prefix` to `met`."""
    optional = [dataclasses.replace(rule, required=False) for rule in rules]

    def intercept(next_fun, args, kwargs, context):
        if not _kind_of(context):
            return next_fun(*args, **kwargs)
        layer = context.module
        path = "/".join(layer.path[len(prefix) :])
        met.add(path)
        recipe = assign([path], optional)[0].recipe
        if not recipe.quantizes:
            return next_fun(*args, **kwargs)
        if isinstance(layer, nn.Einsum):
            return apply_einsum(layer, recipe, *args, **kwargs)
        with _injected(layer, recipe):
            return next_fun(*args, **kwargs)

    return intercept


class _Slot(NamedTuple):
    """Where a kind of layer takes its op.

    Attributes:
      layer: the kind; subclasses too.
      attribute: takes a function; with ``_cls`` at its end, what makes a call site.
      injection: that of a recipe.
    """

    layer: type[nn.Module]
    attribute: str
    injection: Callable


_SLOTS = (
    _Slot(nn.Dense, "dot_general", dot_general_cls),
    _Slot(nn.DenseGeneral, "dot_general", dot_general_cls),
    _Slot(nn.Conv, "conv_general_dilated", conv_general_dilated_cls),
)


def _slot_of(layer: nn.Module) -> _Slot | None:
    return next((slot for slot in _SLOTS if isinstance(layer, slot.layer)), None)


@contextlib.contextmanager
def _injected(layer: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Fills the slot of a bound layer for one call; a clone would be a second call for Flax."""
    slot = _slot_of(layer)
    assert slot is not None
    object.__setattr__(layer, f"{slot.attribute}_cls", slot.injection(recipe))
    try:
        yield
    finally:
        object.__setattr__(layer, f"{slot.attribute}_cls", None)


def _kind_of(context: nn.module.InterceptorContext) -> str | None:
    """The kind of layer that is being called, None for anything that is not quantized."""
    layer = context.module
    if context.method_name != "__call__":
        return None
    slot = _slot_of(layer)
    if slot is not None:
        taken = getattr(layer, slot.attribute), getattr(layer, f"{slot.attribute}_cls")
        return slot.layer.__name__ if taken == (None, None) else None
    # Einsum has no slot, so its call is replaced: that of a subclass may do more.
    return "Einsum" if type(layer) is nn.Einsum else None


def _paths_of_parameters(params: Any) -> set[str]:
    """The paths of all modules that have parameters."""
    flat, _ = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(params))
    paths = (jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in flat)
    return set(paths)
