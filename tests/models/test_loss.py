import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.models import next_token_loss


def logits(dtype=jnp.float32):
    return (5 * jax.random.normal(jax.random.key(0), (2, 5, 11))).astype(dtype)


TARGETS = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_next_token_loss__numpy_log_softmax__equal(dtype):
    total, count = next_token_loss(logits(dtype), TARGETS)
    x = np.asarray(logits(dtype), np.float64)
    log_softmax = x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_softmax, np.asarray(TARGETS)[..., None], -1).sum()
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == 10


def test_next_token_loss__huge_logits__stay_finite():
    total, _ = next_token_loss(logits() * 1e30, TARGETS)
    assert np.isfinite(total)


def test_next_token_loss__parts_of_a_batch__add_up():
    whole = next_token_loss(logits(), TARGETS)
    parts = [next_token_loss(logits()[i : i + 1], TARGETS[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


def test_next_token_loss__negative_targets__count_nothing_and_get_no_gradient():
    targets = TARGETS.at[0].set(-1)
    total, count = next_token_loss(logits(), targets)
    np.testing.assert_allclose(total, next_token_loss(logits()[1:], TARGETS[1:])[0], rtol=1e-6)
    assert count == 5
    grads = jax.grad(lambda x: next_token_loss(x, targets)[0])(logits())
    assert not np.any(grads[0])
    assert np.all(grads[1] != 0)
    assert next_token_loss(logits(), jnp.full((2, 5), -1)) == (0.0, 0.0)


def test_next_token_loss__target_beyond_vocabulary__is_nan():
    assert np.isnan(next_token_loss(logits(), TARGETS.at[0, 0].set(11))[0])


def test_next_token_loss__shape_mismatch__raises_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5, 11\).*must be \(2, 5\)"):
        next_token_loss(logits(), TARGETS[:, :-1])
