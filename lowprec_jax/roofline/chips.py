"""The one table of chips: peak rates, memory, links, and what JAX calls their devices.

Rates are those of dense matrix products per chip, as data sheets state them; vendors quote twice as
much for sparse matrices where it says "with sparsity". Links count one direction: a data sheet's
"bidirectional" bandwidth is halved. Imports no JAX.

Public names: `Chip`, `chips`, `get_chip`, `chip_of_device`.
"""

import dataclasses
import math
import re

from lowprec_jax.errors import UserError, did_you_mean

__all__ = ["Chip", "chip_of_device", "chips", "get_chip"]

_NOT_KNOWN = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip as a data sheet shows it. NaN: not published, or not applicable.

    Attributes:
      name: name on the command line.
      target: the row of `lowprec_jax.recipes.target` that says what it multiplies; None: no row.
      kind: regular expression for `jax.Device.device_kind`; empty: not known.
      bf16: peak of bf16 products, TFLOP/s.
      fp8: peak of FP8 products, TFLOP/s; that of bf16 where there is no faster unit.
      fp4: peak of block-scaled FP4 products, TFLOP/s.
      int8: peak of INT8 products, TOP/s.
      bandwidth: of the memory, GB/s.
      capacity: of the memory, GB (10**9 bytes).
      link: what one chip sends to the others of its node, GB/s in one direction.
      node: chips that such links connect.
      network: what one chip sends beyond its node, GB/s in one direction.
      devices: JAX devices of a chip.
      source: where the figures are from, and which are not from there.
    """

    name: str
    target: str | None = None
    kind: str = ""
    bf16: float = _NOT_KNOWN
    fp8: float = _NOT_KNOWN
    fp4: float = _NOT_KNOWN
    int8: float = _NOT_KNOWN
    bandwidth: float = _NOT_KNOWN
    capacity: float = _NOT_KNOWN
    link: float = _NOT_KNOWN
    node: int = 1
    network: float = _NOT_KNOWN
    devices: int = 1
    source: str

    def rate(self, bits: int, *, integer: bool = False) -> float:
        """Peak FLOP/s of products of codes of this width; the next wider one that is published."""
        if integer:
            found = [self.int8] if bits <= 8 else []
        else:
            found = [self.fp4] * (bits <= 4) + [self.fp8] * (bits <= 8)
        return 1e12 * next((rate for rate in found if not math.isnan(rate)), self.bf16)


def chips() -> tuple[Chip, ...]:
    """All rows of the table."""
    return _CHIPS


def get_chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
      UserError: no such name; the message lists the known names and the nearest.
    """
    known = {chip.name: chip for chip in _CHIPS if chip.target}
    if name not in known:
        raise UserError(
            f"Unknown chip {name!r}. Known: {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return known[name]


def chip_of_device(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where its peaks are not known, as on a CPU."""
    if re.search(r"\bMIG\b", device_kind):  # a part of a GPU, which does not say how large it is
        return None
    return next((c for c in _CHIPS if c.kind and re.fullmatch(c.kind, device_kind)), None)


_NVIDIA = (
    "data sheet, half of the figures with sparsity and of NVLink; network: one 400 Gb/s adapter a "
    "GPU, as in HGX and DGX reference designs"
)
_TPU = "Google Cloud documentation, page of the TPU version; half of the bidirectional ICI"

# The first row whose `kind` matches a device counts.
# fmt: off
_CHIPS = (
    Chip(
        name="gb200", target="nvidia-blackwell", kind=r".*\bGB[23]00\b.*",
        bf16=2500, fp8=5000, fp4=10000, int8=5000,
        bandwidth=8000, capacity=186, link=900, node=72, network=50,
        source=f"NVIDIA GB200 NVL72 {_NVIDIA}. GB300 devices are held to the same peaks.",
    ),
    Chip(
        name="b200", target="nvidia-blackwell", kind=r".*\bB[23]00\b.*",
        bf16=2250, fp8=4500, fp4=9000, int8=4500,
        bandwidth=8000, capacity=180, link=900, node=8, network=50,
        source=f"NVIDIA HGX B200 {_NVIDIA}. B300 devices are held to the same peaks.",
    ),
    Chip(
        name="h200-nvl", target="nvidia-hopper", kind=r".*\bH200 NVL\b.*",
        bf16=835.5, fp8=1670.5, int8=1670.5,
        bandwidth=4800, capacity=141, link=450, node=4, network=50,
        source=f"NVIDIA H200 {_NVIDIA}.",
    ),
    Chip(
        name="h100-nvl", target="nvidia-hopper", kind=r".*\bH100 NVL\b.*",
        bf16=835.5, fp8=1670.5, int8=1670.5,
        bandwidth=3900, capacity=94, link=300, node=2, network=50,
        source=f"NVIDIA H100 {_NVIDIA}.",
    ),
    Chip(
        name="h100-pcie", target="nvidia-hopper", kind=r".*\bH100 PCIe\b.*",
        bf16=756.5, fp8=1513, int8=1513,
        bandwidth=2000, capacity=80, link=300, node=2, network=50,
        source=f"NVIDIA H100 {_NVIDIA}.",
    ),
    Chip(
        name="h200", target="nvidia-hopper", kind=r".*\bG?H200\b.*",
        bf16=989.4, fp8=1978.9, int8=1978.9,
        bandwidth=4800, capacity=141, link=450, node=8, network=50,
        source=f"NVIDIA H200 {_NVIDIA}.",
    ),
    Chip(
        name="h100", target="nvidia-hopper", kind=r".*\bH100\b.*",
        bf16=989.4, fp8=1978.9, int8=1978.9,
        bandwidth=3350, capacity=80, link=450, node=8, network=50,
        source=f"NVIDIA H100 SXM {_NVIDIA}.",
    ),
    Chip(
        name="l40s", kind=r".*\bL40S\b.*",
        bf16=362.05, fp8=733,
        source="NVIDIA L40S data sheet.",
    ),
    Chip(name="l4", kind=r".*\bL4\b.*", bf16=121, fp8=242.5, source="NVIDIA L4 data sheet."),
    Chip(
        name="a100", kind=r".*\bA100\b.*",
        bf16=312, fp8=312,
        source="NVIDIA A100 data sheet; no FP8.",
    ),
    Chip(
        name="mi355x", target="amd-mi350", kind=r".*\bMI355X\b.*",
        bf16=2516.6, fp8=5033.2, fp4=10066.3, int8=5033.2,
        bandwidth=8000, capacity=288, link=537, node=8, network=50,
        source="AMD Instinct MI355X data sheet, peak theoretical without sparsity; link: half of 7 "
        "x 153.6 GB/s; network assumed: 400 Gb/s a GPU.",
    ),
    Chip(
        name="mi350x", target="amd-mi350", kind=r".*\bMI350X\b.*",
        bf16=2306.9, fp8=4613.7, fp4=9227.5, int8=4613.7,
        bandwidth=8000, capacity=288, link=537, node=8, network=50,
        source="AMD Instinct MI350X data sheet; as MI355X.",
    ),
    Chip(
        name="mi300x", target="amd-mi300", kind=r".*\bMI3(00|25)X\b.*",
        bf16=1307.4, fp8=2614.9, int8=2614.9,
        bandwidth=5300, capacity=192, link=448, node=8, network=50,
        source="AMD Instinct MI300X data sheet, without sparsity; link: half of 7 x 128 GB/s; "
        "network assumed: 400 Gb/s a GPU. MI325X devices are held to the same peaks.",
    ),
    Chip(name="tpu-v4", kind=r"TPU v4", bf16=275, fp8=275, source=f"{_TPU}."),
    Chip(name="tpu-v5e", kind=r"TPU v5( lite|e)", bf16=197, fp8=197, source=f"{_TPU}."),
    Chip(
        name="tpu-v5p", target="tpu-v5", kind=r"TPU v5p?",
        bf16=459, fp8=459, int8=918,
        bandwidth=2765, capacity=102, link=600, node=8960, network=6.25,
        source=f"{_TPU}. 95 GiB.",
    ),
    Chip(
        name="tpu-v6e", target="tpu-v6", kind=r"TPU v6( lite|e)",
        bf16=918, fp8=918, int8=1836,
        bandwidth=1638, capacity=32, link=400, node=256, network=12.5,
        source=f"{_TPU}. Network not checked.",
    ),
    Chip(
        name="tpu-v7", target="tpu-v7", kind=r"TPU7x",
        bf16=2307, fp8=4614,
        bandwidth=7380, capacity=206, link=600, node=9216, network=12.5, devices=2,
        source=f"{_TPU}. 192 GiB; bandwidth, link and network not checked.",
    ),
    Chip(
        name="trn2", target="trainium2",
        bf16=667, fp8=1299,
        bandwidth=2900, capacity=103, link=640, node=16, network=25,
        source="AWS Neuron documentation, Trainium2 architecture; 96 GiB; link: half of 1.28 TB/s; "
        "network: 3.2 Tb/s EFA for 16 chips, not checked.",
    ),
    Chip(
        name="trn3", target="trainium3",
        bf16=671, fp8=2517, fp4=2517,
        bandwidth=4900, capacity=155, link=1280, node=144, network=25,
        source="AWS Neuron documentation, Trainium3 architecture (MXFP8 and MXFP4); 144 GiB; link: "
        "half of 2.56 TB/s; node and network not checked.",
    ),
    Chip(name="cpu", target="cpu", source="no published peaks: give --peak and --bandwidth."),
)
# fmt: on
