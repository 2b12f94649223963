"""States from one precision to another: at a switch, and out of a checkpoint.

Public names: `switch_state`, `read_state`.
"""

from collections.abc import Callable

from lowprec_jax.training.checkpoint import Checkpoints, Found
from lowprec_jax.training.conversion import Conversion, plan_conversion
from lowprec_jax.training.programs import Programs
from lowprec_jax.training.state_leaves import Leaves, abstract, leaves_of, state_from
from lowprec_jax.training.step import Batch, TrainState

__all__ = ["read_state", "switch_state"]


def switch_state(state: TrainState, programs: Programs, load: Callable[[], Batch]) -> TrainState:
    """The state as other programs need it; layers that are new in low precision are calibrated.

    Args:
      state: as the programs before it left it.
      programs: what goes on.
      load: gives the next batch, to calibrate with.
    """
    leaves = leaves_of(state)
    return _made(plan_conversion(leaves, leaves_of(programs.like)), leaves, programs, load)


def read_state(
    checkpoints: Checkpoints, found: Found, programs: Programs, load: Callable[[], Batch]
) -> tuple[TrainState, list[str]]:
    """The state of a checkpoint as the programs need it, and what was converted.

    Raises:
      UserError: it is of another model or optimizer, see `plan_conversion`.
    """
    stored = abstract({name: record.kind for name, record in found.manifest.arrays.items()})
    conversion = plan_conversion(stored, leaves_of(programs.like))
    leaves = checkpoints.read(found, conversion.needs)
    return _made(conversion, leaves, programs, load), conversion.messages


def _made(
    conversion: Conversion, leaves: Leaves, programs: Programs, load: Callable[[], Batch]
) -> TrainState:
    state = state_from(conversion.make(leaves), programs.like)
    return programs.calibrate(state, load()) if conversion.uncalibrated else state
