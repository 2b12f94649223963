"""A small convolutional network on real images, in any recipe.

The images are scikit-learn's digits: 1797 handwritten ones of 8 x 8 pixels (the test set of UCI's
Optical Recognition of Handwritten Digits), shuffled with seed 0; the last 360 are the test set. The
loop is Flax's documented one for NNX, with the two lines that adopt a recipe marked # 1 and # 2.

Run: python -m examples.digits_cnn --recipe fp8_delayed
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import lowprec_jax as lp

TEST_IMAGES = 360
BATCH = 64


class Cnn(nnx.Module):
    """Images float[batch, 8, 8, 1] to logits f32[batch, 10]."""

    def __init__(self, dtype, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        self.conv1 = conv(1, 32)
        self.conv2 = conv(32, 64, strides=2)
        self.conv3 = conv(64, 64, strides=2)
        self.head = nnx.Linear(4 * 64, 10, rngs=rngs)

    def __call__(self, images):  # noqa: D102
        x = images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.head(x.reshape(len(x), -1).astype(jnp.float32))


def loss_fn(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def load():
    """``(images, labels)`` for training and for the test, pixels from 0 to 1."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = np.float32(digits.images[order, :, :, None] / 16)
    labels = np.int32(digits.target[order])
    return (images[:-TEST_IMAGES], labels[:-TEST_IMAGES]), (
        images[-TEST_IMAGES:],
        labels[-TEST_IMAGES:],
    )


def train(recipe, epochs, seed=0):
    """Trains in bf16 with convolutions in `recipe` ("none": bf16); returns the test accuracy."""
    (images, labels), (test_images, test_labels) = load()
    model = lp.nnx.quantize(Cnn(jnp.bfloat16, nnx.Rngs(seed)), recipe)  # 1
    steps = epochs * (len(images) // BATCH)
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, images, labels):
        _, grads = lp.nnx.value_and_grad(loss_fn)(model, images, labels)  # 2
        optimizer.update(model, grads)

    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for batch in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
            train_step(model, optimizer, images[batch], labels[batch])
    predicted = nnx.jit(lambda model, images: model(images).argmax(-1))(model, test_images)
    return float(jnp.mean(predicted == test_labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fp8_delayed")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    accuracy = train(args.recipe, args.epochs, args.seed)
    print(
        f"{args.recipe}: test accuracy {accuracy:.4f} on {TEST_IMAGES} images after {args.epochs} "
        f"epochs ({jax.default_backend()})"
    )


if __name__ == "__main__":
    main()
