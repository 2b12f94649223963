"""Next-token loss as a sum and a count, to be divided by the global token count.

Imports JAX only. Public name: `next_token_loss`.
"""

import jax
import jax.numpy as jnp


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy of the targets and how many were counted.

    sum over tokens of logsumexp(logits) - logits[target], in f32. Divide the sum by the
    token count of the *whole* batch before taking gradients: means per device or
    micro-batch that are averaged later change the range of the output gradients, and with
    it their FP8 scales. Negative targets are padding and count nothing; a target of V or
    more gives NaN. No counted target gives (0, 0).

    Args:
      logits_BTV: logits, any float dtype, [batch, tokens, vocabulary].
      targets_BT: ids of the *following* tokens (already shifted), integer.

    Returns:
      sum_loss, f32[], in nats; token_count, f32[] (exact below 2**24 tokens).

    Raises:
      ValueError: the targets have not the leading shape of the logits.

    Example:
      >>> total, count = next_token_loss(jnp.zeros((2, 3, 8)), jnp.ones((2, 3), jnp.int32))
      >>> round(float(total / count), 4), float(count)  # log(8)
      (2.0794, 6.0)
    """
    if logits_BTV.shape[:-1] != targets_BT.shape:
        raise ValueError(
            f"next_token_loss: targets have shape {targets_BT.shape}, logits "
            f"{logits_BTV.shape}; targets must be {logits_BTV.shape[:-1]}, one id per position."
        )
    logits_BTV = logits_BTV.astype(jnp.float32)
    counted_BT = targets_BT >= 0
    index_BT1 = jnp.where(counted_BT, targets_BT, 0)[..., None]
    target_logit_BT = jnp.take_along_axis(logits_BTV, index_BT1, axis=-1)[..., 0]
    loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
    sum_loss = jnp.where(counted_BT, loss_BT, 0.0).sum()
    return sum_loss, counted_BT.sum(dtype=jnp.float32)
