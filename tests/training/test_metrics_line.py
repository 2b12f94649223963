"""The progress line: what a person reads."""

import io

from rich.console import Console

from lowprec_jax.training.progress_line import ProgressLine

RECORD = {
    "step": 1,
    "loss": 2.34567,
    "seconds": 0.25,
    "tokens_per_second": 4000.0,
    "mfu": None,
    "recipe": "fp8_delayed",
}
HEALTH = {
    "saturated": 0.0123,
    "underflow": 0.25,
    "nonfinite": 3.0,
    "scale_age": 17.0,
    "worst": "blocks/mlp/down[2] output_grad",
}


def shown(records, *, terminal=False, every=1, messages=(), **options) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200, color_system=None)
    with ProgressLine(console, 0, 20, live=True, every=every, **options) as line:
        for record in records:
            line.update(record)
        for message in messages:
            line.message(message)
    return text.getvalue()


def test_line__plain__says_loss_speed_and_the_worst_operand():
    text = shown([RECORD | HEALTH])
    assert text.startswith(
        "step 1/20  loss 2.3457  4,000 tok/s  250.0 ms/step  FP8: sat 1.23% under 25.00% "
        "nonfinite 3 age 17 worst blocks/mlp/down[2] output_grad  eta "
    )


def test_line__no_quantized_layers__has_no_health_and_slow_steps_are_in_seconds():
    text = shown([RECORD | {"seconds": 4.0, "tokens_per_second": 250.0, "mfu": 0.4142}])
    assert text.startswith("step 1/20  loss 2.3457  250 tok/s  4.00 s/step  MFU 41.4%  eta ")


def test_line__speed__is_a_running_mean_of_the_time():
    """0.9 x 1 s + 0.1 x 11 s = 2 s a step of 1000 tokens."""
    steps = [(1, 1.0), (2, 11.0)]
    records = [RECORD | {"step": n, "seconds": s, "tokens_per_second": 1000 / s} for n, s in steps]
    assert "  500 tok/s  2.00 s/step" in shown(records).splitlines()[1]


def test_line__plain__is_printed_every_few_steps_and_at_the_end():
    records = [RECORD | {"step": step} for step in range(1, 21)]
    steps = [line.split("/")[0] for line in shown(records, every=8).splitlines()]
    assert steps == ["step 8", "step 16", "step 20"]


def test_line__validation_loss__stays_on_it():
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=200)
    with ProgressLine(console, 0, 20, live=True, every=1) as line:
        line.validation(1.25)
        line.update(RECORD)
    assert "val 1.2500" in text.getvalue()


def test_line__terminal__has_a_bar_with_health_below_and_messages_above():
    text = shown([RECORD | HEALTH], terminal=True, messages=["rolled back to step 1 [bold]"])
    lines = text.splitlines()
    assert "step 1/20" in text
    assert "250.0 ms/step" in text
    last = [i for i, line in enumerate(lines) if "worst blocks/mlp/down[2] output_grad" in line][-1]
    message = next(i for i, line in enumerate(lines) if "rolled back to step 1 [bold]" in line)
    assert message < last
