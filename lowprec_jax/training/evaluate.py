"""Validation loss over windows of text: exact means, with the scales of training."""

from collections.abc import Callable

import jax
import numpy as np

from lowprec_jax.models import next_token_loss
from lowprec_jax.training.network import Network
from lowprec_jax.training.step import TrainState


def build_evaluation(
    network: Network, windows: tuple[np.ndarray, np.ndarray], batch_size: int
) -> Callable[..., float | None]:
    """``(state, interrupted) -> loss``: the mean loss, in nats per token, over all windows.

    ``interrupted()`` is asked before every batch; if it says so, the result is None.

    Args:
      network: the network.
      windows: inputs and targets, int32 [n, context].
      batch_size: windows per call; the last call is padded with targets that do not count.
    """
    batches = list(_padded_batches(windows, batch_size))

    @network.layout.jit
    def sums(state: TrainState, batch):
        model = network.whole(network.merge(state.weights, state.scaling))
        return next_token_loss(model(batch[0]), batch[1])

    def evaluate(
        state: TrainState, interrupted: Callable[[], bool] = lambda: False
    ) -> float | None:
        total = np.zeros(2)
        for batch in batches:
            if interrupted():
                return None
            part = sums(state, network.layout.put_batch(batch))
            total += np.array(jax.device_get(part), np.float64)
        return float(total[0] / total[1])

    return evaluate


def _padded_batches(windows: tuple[np.ndarray, np.ndarray], batch_size: int):
    inputs, targets = windows
    for start in range(0, len(inputs), batch_size):
        part = [x[start : start + batch_size] for x in (inputs, targets)]
        missing = ((0, batch_size - len(part[0])), (0, 0))
        yield np.pad(part[0], missing), np.pad(part[1], missing, constant_values=-1)
