"""The README's Python runs as it is printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lowprec_jax as lp

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
X = jax.random.normal(jax.random.key(0), (16, 8))


class Block(nnx.Module):
    """A block of the README's imagined model."""

    def __init__(self, rngs):
        self.attention = nnx.Dict(out=nnx.Linear(8, 8, rngs=rngs))
        self.mlp = nnx.Dict(up=nnx.Linear(8, 12, rngs=rngs), down=nnx.Linear(12, 8, rngs=rngs))

    def __call__(self, x):
        x = x + self.attention.out(x)
        return x + self.mlp.down(nnx.relu(self.mlp.up(x)))


class MyModel(nnx.Module):
    """The README's imagined model."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def loss_fn(model, batch):
    return (model(batch) ** 2).mean()


def run(index: int, **names):
    """Runs a block of the README; returns the names that it leaves."""
    code = compile(BLOCKS[index], f"README.md block {index}", "exec")
    exec(code, names)
    return names


def test_readme__every_block__is_tested_here():
    assert len(BLOCKS) == 3


def test_readme__two_lines__the_loss_falls_and_scales_follow():
    names = run(0, nnx=nnx, optax=optax, MyModel=MyModel, loss_fn=loss_fn)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        losses = [names["train_step"](names["model"], names["optimizer"], X) for _ in range(8)]
    assert losses[-1] < losses[0]
    histories = jax.tree.leaves(lp.nnx.scaling_state(names["model"])["blocks/0/mlp/up/dot_general"])
    assert all(bool(jnp.isfinite(h).all()) for h in histories)


def test_readme__rules_and_plan__print_a_table(capsys):
    model = MyModel(nnx.Rngs(0))
    run(1, lp=lp, model=model, inputs=X)
    assert model.blocks[0].mlp.up.dot_general.recipe.name == "fp8_delayed"
    assert model.blocks[1].attention.out.dot_general.recipe.name == "fp8_current"
    assert "100.0% of the matmul FLOPs in low precision." in capsys.readouterr().out


def test_readme__without_flax__state_advances():
    names = run(2, params={"w": jnp.ones((8, 4))}, x=X)
    history = names["scaling"]["w"]["amax_history"]
    assert history[0, :2].tolist() == pytest.approx([float(jnp.abs(X).max())] * 2)
