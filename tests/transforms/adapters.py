"""The same network in each front end, and each front end's form of a transform inside the model.

An adapter makes a *carrier* (a pytree of parameters and scaling state) and a *step*
``(carrier, x, c) -> (value, grads, carrier)``. The carrier holds two layers, or a stack of two. A
``forward`` is one of its methods, of a *net*: what the front end calls a live model.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax
from transforms.helpers import LAYERS, WIDTH, W, stack_of, start_site

import lowprec_jax as lp
from lowprec_jax import ops
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT as OWG

NN = (((1,), (0,)), ((), ()))


def _halves(x):
    return x.reshape(LAYERS, -1, WIDTH)


class Functional:
    """Plain functions; a net is ``(params, live)``."""

    def __init__(self, recipe):
        self.recipe = recipe

    def start(self, stacked):
        layers = jnp.asarray(W), start_site(self.recipe, (LAYERS,))
        if not stacked:
            layers = list(layers[0]), [start_site(self.recipe) for _ in range(LAYERS)]
        return {"params": layers[0], "state": layers[1]}

    def step(self, forward, parts=1, reduce=lambda value: value, per_example=False):
        def loss(params, live, x, c):
            x, c = jnp.atleast_2d(x), jnp.atleast_2d(c)
            return reduce((forward((params, live), x) * c).sum())

        run = lp.state.per_example(loss) if per_example else lp.state.accumulate(loss, parts)

        def step(carrier, x, c):
            (value, grads), state = run(carrier["params"], carrier["state"], x, c)
            return value, grads, carrier | {"state": lp.state.advance(state)}

        return step

    def probing_step(self, forward, wrap, copies):
        def step(carrier, x, c):
            tree = carrier["state"]

            def part(params, probes, x, c):
                net = (params, lp.state.attach_probes(tree, probes))
                return (forward(net, x) * c).sum()

            grad = jax.value_and_grad(wrap(part), argnums=(0, 1))
            probes = lp.state.make_probes(tree, copies)
            value, (grads, seen) = grad(carrier["params"], probes, x, c)
            state = lp.state.advance(lp.state.collect_probes(tree, seen))
            return value, grads, carrier | {"state": state}

        return step

    def read(self, carrier):
        state = carrier["state"]
        return stack_of(state) if isinstance(state, list) else state

    def read_grads(self, grads):
        return jnp.stack(grads) if isinstance(grads, list) else grads

    def layer(self, net, x):
        w, site = net
        return jax.nn.relu(ops.dot_general(x, w, NN, recipe=self.recipe, state=site))

    def chain(self, net, x, calls=(0, 1)):
        for i in calls:
            x = self.layer((net[0][i], net[1][i]), x)
        return x

    def remat(self, net, x, policy):
        return jax.checkpoint(lambda x, *ws: self.chain((ws, net[1]), x), policy=policy)(x, *net[0])

    def scan(self, net, x, calls=1, remat=False):
        def body(x, one):
            for _ in range(calls):
                x = self.layer(one, x)
            return x, None

        return lax.scan(jax.checkpoint(body) if remat else body, x, net)[0]

    def lax_scan(self, net, x):
        """The ref is closed over, the index is data."""
        ws, live = net
        sink = live.get("sink")
        live = {key: value for key, value in live.items() if key != "sink"}

        def body(x, one):
            w, site, i = one
            site = site if sink is None else {**site, "sink": ops.IndexedSink(sink, i)}
            return self.layer((w, site), x), None

        return lax.scan(body, x, (ws, live, jnp.arange(LAYERS)))[0]

    def experts(self, net, x):
        return jax.vmap(self.layer)(net, _halves(x)).reshape(x.shape)

    def cond(self, net, x, taken):
        x = self.chain(net, x, (0,))
        second = (net[0][1], net[1][1])
        return ops.cond(taken(x), self.layer, lambda net, x: x, second, x)

    def vmapped(self, net, x):
        return jax.vmap(lambda x: self.chain(net, x[None])[0])(x)


class Linen:
    """Flax Linen; a net is the variables."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.model = LinenPair(recipe)

    def start(self, stacked):
        if stacked:
            return self._variables({"blocks": {"layer": W}}, (LAYERS,))
        return self._variables({f"layer_{i}": W[i] for i in range(LAYERS)}, ())

    def _variables(self, kernels, stack):
        site = {"DotGeneral_0": {"scaling": start_site(self.recipe, stack)}}
        is_site = lambda x: x is None  # noqa: E731
        variables = {"params": jax.tree.map(lambda w: {"kernel": jnp.asarray(w)}, kernels)}
        if self.recipe.stateful:
            variables[OWG] = jax.tree.map(lambda _: site, kernels, is_leaf=is_site)
        return variables

    def step(self, forward, parts=1, reduce=lambda value: value, per_example=False):
        def loss(variables, x, c):
            x, c = jnp.atleast_2d(x), jnp.atleast_2d(c)
            return reduce((forward(variables, x) * c).sum())

        run = lp.linen.per_example(loss) if per_example else lp.linen.accumulate(loss, parts)

        def step(variables, x, c):
            value, grads = run(variables, x, c)
            following = {OWG: grads[OWG]} if OWG in grads else {}
            return value, grads["params"], {"params": variables["params"], **following}

        return step

    def probing_step(self, forward, wrap, copies):
        def step(variables, x, c):
            params, tree = variables["params"], variables.get(OWG, {})

            def part(params, probes, x, c):
                live = {OWG: lp.state.attach_probes(tree, probes)} if tree else {}
                return (forward({"params": params, **live}, x) * c).sum()

            grad = jax.value_and_grad(wrap(part), argnums=(0, 1))
            value, (grads, seen) = grad(params, lp.state.make_probes(tree, copies), x, c)
            state = lp.state.advance(lp.state.collect_probes(tree, seen))
            return value, grads, {"params": params, **({OWG: state} if tree else {})}

        return step

    def read(self, carrier):
        found = [site for _, site in lp.state.sites(carrier[OWG])]
        return found[0] if "blocks" in carrier["params"] else stack_of(found)

    def read_grads(self, grads):
        leaves = jax.tree.leaves(grads)
        return leaves[0] if "blocks" in grads else jnp.stack(leaves)

    def chain(self, net, x, calls=(0, 1)):
        return self.model.apply(net, x, method=functools.partial(LinenPair.chain, calls=calls))

    def remat(self, net, x, policy):
        run = nn.remat(LinenPair.chain, policy=policy)
        return self.model.apply(net, x, method=run)

    def scan(self, net, x, calls=1, remat=False):
        block = nn.remat(LinenBlock) if remat else LinenBlock
        return LinenStack(self.recipe, calls, nn.scan, block).apply(net, x, None)[0]

    def lax_scan(self, net, x):
        block = LinenBlock(self.recipe)
        stacked = {k: v["blocks"] for k, v in net.items() if v}  # no state: none
        return lax.scan(lambda x, one: block.apply(one, x, None), x, stacked)[0]

    def experts(self, net, x):
        stack = LinenStack(self.recipe, 1, nn.vmap, LinenBlock)
        return stack.apply(net, _halves(x), None)[0].reshape(x.shape)

    def cond(self, net, x, taken):
        def run(module, x):
            x = module.chain(x, (0,))
            second = lambda module, x: module.chain(x, (1,))  # noqa: E731
            return lp.linen.cond(taken(x), second, lambda module, x: x, module, x)

        return self.model.apply(net, x, method=run)

    def vmapped(self, net, x):
        return jax.vmap(lambda x: self.chain(net, x[None])[0])(x)


def _dense(recipe, name=None):
    return lp.linen.Dense(WIDTH, use_bias=False, recipe=recipe, name=name)


class LinenPair(nn.Module):
    recipe: lp.recipes.Recipe

    def setup(self):
        self.layer = [_dense(self.recipe) for _ in range(LAYERS)]

    def chain(self, x, calls=(0, 1)):
        for i in calls:
            x = nn.relu(self.layer[i](x))
        return x


class LinenBlock(nn.Module):
    recipe: lp.recipes.Recipe
    calls: int = 1

    @nn.compact
    def __call__(self, x, _):
        layer = _dense(self.recipe, "layer")
        for _ in range(self.calls):
            x = nn.relu(layer(x))
        return x, None


class LinenStack(nn.Module):
    """A stack of blocks under `nn.scan` or `nn.vmap`."""

    recipe: lp.recipes.Recipe
    calls: int
    lift: object
    block: object

    @nn.compact
    def __call__(self, x, _):
        options = {"length": LAYERS} if self.lift is nn.scan else {"in_axes": (0, None)}
        blocks = self.lift(
            self.block, variable_axes={"params": 0, OWG: 0}, split_rngs={"params": True}, **options
        )
        return blocks(self.recipe, self.calls, name="blocks")(x, None)


class Nnx:
    """Flax NNX; a net is the model, the carrier its arrays."""

    def __init__(self, recipe):
        self.recipe = recipe

    def start(self, stacked):
        model = NnxStack(self.recipe) if stacked else NnxPair(self.recipe)
        for _, site in lp.nnx.iter_sites(model):
            site.set_scaling(start_site(self.recipe, (LAYERS,) if stacked else ()))
        if stacked:
            model.layer.kernel[...] = jnp.asarray(W)
        else:
            for layer, w in zip(model.layers, W, strict=True):
                layer.kernel[...] = jnp.asarray(w)
        self.graphdef, carrier = nnx.split(model)
        return carrier

    def step(self, forward, parts=1, reduce=lambda value: value, per_example=False):
        def loss(model, x, c):
            x, c = jnp.atleast_2d(x), jnp.atleast_2d(c)
            return reduce((forward(model, x) * c).sum())

        run = lp.nnx.per_example(loss) if per_example else lp.nnx.accumulate(loss, parts)

        def step(carrier, x, c):
            model = nnx.merge(self.graphdef, carrier)
            value, grads = run(model, x, c)
            return value, grads, nnx.state(model)

        return step

    def probing_step(self, forward, wrap, copies):
        def part(model, probes, x, c):
            with lp.nnx.probing(model, probes):
                return (forward(model, x) * c).sum()

        def step(carrier, x, c):
            model = nnx.merge(self.graphdef, carrier)
            grad = nnx.value_and_grad(wrap(part), argnums=(0, 1))
            value, (grads, seen) = grad(model, lp.nnx.make_probes(model, copies), x, c)
            lp.nnx.collect_probes(model, seen)
            return value, grads, nnx.state(model)

        return step

    def read(self, carrier):
        found = lp.nnx.scaling_state(nnx.merge(self.graphdef, carrier))
        found = [found[path] for path in sorted(found)]
        return found[0] if len(found) == 1 else stack_of(found)

    def read_grads(self, grads):
        leaves = jax.tree.leaves(grads)
        return leaves[0] if len(leaves) == 1 else jnp.stack(leaves)

    def chain(self, net, x, calls=(0, 1)):
        for i in calls:
            x = nnx.relu(net.layers[i](x))
        return x

    def remat(self, net, x, policy):
        return nnx.remat(lambda net, x: self.chain(net, x), policy=policy)(net, x)

    def scan(self, net, x, calls=1, remat=False):
        def body(x, layer):
            for _ in range(calls):
                x = nnx.relu(layer(x))
            return x

        body = nnx.remat(body) if remat else body
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, net.layer)

    def lax_scan(self, net, x):
        graphdef, arrays = nnx.split(net.layer)
        body = lambda x, one: (nnx.relu(nnx.merge(graphdef, one)(x)), None)  # noqa: E731
        return lax.scan(body, x, arrays)[0]

    def experts(self, net, x):
        return nnx.vmap(lambda layer, x: nnx.relu(layer(x)))(net.layer, _halves(x)).reshape(x.shape)

    def cond(self, net, x, taken):
        x = self.chain(net, x, (0,))
        second = lambda net, x: self.chain(net, x, (1,))  # noqa: E731
        return lp.nnx.cond(taken(x), second, lambda net, x: x, net, x)

    def vmapped(self, net, x):
        return nnx.vmap(lambda net, x: self.chain(net, x[None])[0], in_axes=(None, 0))(net, x)


def _linear(recipe, rngs):
    return lp.nnx.Linear(WIDTH, WIDTH, use_bias=False, recipe=recipe, rngs=rngs)


class NnxPair(nnx.Module):
    def __init__(self, recipe):
        self.layers = nnx.List([_linear(recipe, nnx.Rngs(0)) for _ in range(LAYERS)])


class NnxStack(nnx.Module):
    def __init__(self, recipe):
        create = nnx.vmap(lambda rngs: _linear(recipe, rngs))
        self.layer = create(nnx.Rngs(0).split(LAYERS))


ADAPTERS = {"functional": Functional, "linen": Linen, "nnx": Nnx}
