import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import cast


def test_main__small_tensor__copy_is_the_reference(tmp_path):
    record = tmp_path / "out.json"

    code = cast.main(
        ["--elements", "4096", "--rounds", "2", "--allocator", "default", "--json", str(record)]
    )

    assert code == 0
    rows = {row["case"]: row for row in json.loads(record.read_text())["rows"]}
    assert rows["copy"]["x copy"] == 1
    # 4 bytes read and 4 written, each element; the amax is a rounding error beside it.
    moved = rows["copy"]["GB/s"] * rows["copy"]["ms"] * 1e6
    np.testing.assert_allclose(moved, 8 * 4096, rtol=1e-6)


def test_cases__codes__those_of_ml_dtypes():
    x = jax.random.normal(jax.random.key(1), (64, 64))
    amax = jnp.abs(x).max()
    scale = np.float32(amax) * (np.float32(1) / np.float32(448))
    want = (np.asarray(x) * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn)

    for case in ("delayed e4m3", "current e4m3", "cast alone"):
        out = jax.jit(cast.CASES[case])(x, amax)
        codes, counts = out if isinstance(out, tuple) else (out, None)

        np.testing.assert_array_equal(codes, want.view(np.uint8))
        assert counts is None or (counts.amax == amax and counts.nonfinite == 0)
