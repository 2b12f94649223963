"""Weights in checkpoints: what compressed-tensors and transformers read out of our bytes."""

import functools
import importlib
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import numerics
from lowprec_jax.numerics import Quantizer

SHAPE = (1024, 1024)  # [out, in], a million values
BLOCK = 32
QUANTIZE = jax.jit(lambda x, quantizer, tile: quantizer(x, tile), static_argnums=(1, 2))
MX = jax.jit(numerics.quantize_mx, static_argnums=1)
MX_VALUES = jax.jit(numerics.dequantize_mx, static_argnums=2)
NVFP4 = jax.jit(numerics.quantize_nvfp4)
NVFP4_VALUES = jax.jit(numerics.dequantize_nvfp4)

# Strategy of compressed-tensors -> elements that share a scale, and its arguments.
STRATEGIES = {
    "tensor": ((), {}),
    "channel": ((1, SHAPE[1]), {}),
    "block": ((BLOCK, BLOCK), {"block_structure": [BLOCK, BLOCK]}),
    "group": ((1, BLOCK), {"group_size": BLOCK}),
}


@functools.cache
def oracle(module: str):
    """torch and a module of an oracle, or a skip; what their imports warn of is of no use here."""
    reason = "compressed-tensors and transformers come with the extra 'oracle'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch = pytest.importorskip("torch", reason=reason)
            pytest.importorskip(module.partition(".")[0], reason=reason)
            return torch, importlib.import_module(module)
        finally:
            logging.disable(logging.NOTSET)


def decompress(compressor: str, tensors: dict, **weights):
    """The weight that a compressor of compressed-tensors makes of the tensors of a checkpoint."""
    _, compressors = oracle("compressed_tensors.compressors")
    _, quantization = oracle("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    weight = getattr(compressors, compressor).decompress(tensors, scheme)["weight"]
    return weight.float().numpy()


def tensor(x, dtype: str | None = None):
    """A torch tensor of the same bytes, as `dtype` if torch has another name for them."""
    torch, _ = oracle("compressed_tensors.compressors")
    x = np.array(x)
    x = torch.from_numpy(x.view(np.uint8) if dtype else x)
    return x.view(getattr(torch, dtype)) if dtype else x


@functools.cache
def weights(seed: int = 0) -> np.ndarray:
    """f32 `SHAPE`, over forty binades: codes of every kind under every scale."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(SHAPE) * 2.0 ** rng.uniform(-30, 10, SHAPE)).astype(np.float32)


def values_of(name: str, strategy: str):
    """A weight quantized by us: the scaled array, and its values as f32."""
    tile, _ = STRATEGIES[strategy]
    quantizer = Quantizer(numerics.get_format(name), free=None if strategy == "tensor" else 1)
    x = QUANTIZE(jnp.asarray(weights()), quantizer, tile)
    assert np.unique(np.asarray(x.data).view(np.uint8)).size >= 15  # every int4 but -8
    return x, np.asarray(x.dequantize())


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8_weight__decompressed__is_our_value_bitwise(strategy):
    x, expected = values_of("e4m3fn", strategy)
    tensors = {
        "weight": tensor(x.data, "float8_e4m3fn"),
        "weight_scale": tensor(np.atleast_1d(x.scale)),
    }
    options = {"num_bits": 8, "type": "float", "strategy": strategy, **STRATEGIES[strategy][1]}
    found = decompress("FloatQuantizationCompressor", tensors, **options)
    np.testing.assert_array_equal(found, expected)


def test_fp8_block__read_by_transformers__is_our_value_bitwise():
    x, expected = values_of("e4m3fn", "block")
    _, fp8 = oracle("transformers.integrations.finegrained_fp8")
    found = fp8.Fp8Dequantize(None).convert(
        {"weight": tensor(x.data, "float8_e4m3fn"), "weight_scale_inv": tensor(x.scale)}
    )["weight"]
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_int4_weight__packed_to_int32__is_our_packing_with_an_offset_and_our_value(strategy):
    torch, helpers = oracle("compressed_tensors.compressors.pack_quantized.helpers")
    x, expected = values_of("int4", strategy)
    codes = np.asarray(x.data).astype(np.int8)
    # Theirs are code + 8, ours two's complement: the sign bit of each code is flipped.
    packed = np.asarray(numerics.pack_4bit(jnp.asarray(codes))) ^ 0x88
    np.testing.assert_array_equal(
        packed, helpers.pack_to_int32(torch.from_numpy(codes.copy()), 4).numpy().view(np.uint8)
    )
    tensors = {
        "weight_packed": torch.from_numpy(packed.view(np.int32)),
        "weight_scale": tensor(x.scale),
        "weight_shape": torch.tensor(SHAPE),
    }
    options = {"num_bits": 4, "type": "int", "strategy": strategy, **STRATEGIES[strategy][1]}
    found = decompress("PackedQuantizationCompressor", tensors, **options)
    np.testing.assert_array_equal(found, expected)


def test_pack_4bit__every_pair_of_e2m1__equals_compressed_tensors():
    torch, helpers = oracle("compressed_tensors.compressors.nvfp4.helpers")
    pairs = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).astype(np.uint8)
    codes = jnp.asarray(pairs.reshape(16, 32))
    values = np.asarray(numerics.decode(codes, numerics.E2M1))
    packed = np.asarray(numerics.pack_4bit(codes))
    np.testing.assert_array_equal(
        packed, helpers.pack_fp4_to_uint8(torch.from_numpy(values.copy())).numpy()
    )
    unpacked = helpers.unpack_fp4_from_uint8(torch.from_numpy(packed.copy()), 16, 32, torch.float32)
    np.testing.assert_array_equal(unpacked.numpy().view(np.uint32), values.view(np.uint32))


def nvfp4(amax: float):
    """A weight with this amax as NVFP4: its tensors in a checkpoint, and our values."""
    x = weights() / np.abs(weights()).max() * np.float32(amax)
    codes, scales, whole = NVFP4(jnp.asarray(x))
    tensors = {
        "weight_packed": tensor(numerics.pack_4bit(codes)),
        "weight_scale": tensor(scales, "float8_e4m3fn"),
        "weight_global_scale": tensor(1 / np.atleast_1d(whole)),  # theirs divides
    }
    return tensors, np.asarray(NVFP4_VALUES(codes, scales, whole))


NVFP4_ARGS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def test_nvfp4_weight__decompressed__is_our_value_bitwise_under_a_power_of_two():
    tensors, expected = nvfp4(448 * 6 * 2.0**-12)
    assert tensors["weight_global_scale"].item() == 2**12
    found = decompress("NVFP4PackedCompressor", tensors, **NVFP4_ARGS)
    np.testing.assert_array_equal(found, expected)


def test_nvfp4_weight__decompressed_under_any_scale__differs_by_its_roundings():
    """Theirs rounds 1 / global, scale / that and the product, ours the product: in all 4 halves."""
    torch, helpers = oracle("compressed_tensors.compressors.nvfp4.helpers")
    _, quantization = oracle("compressed_tensors.quantization")
    _, forward = oracle("compressed_tensors.quantization.lifecycle.forward")
    tensors, expected = nvfp4(3.0)
    codes = helpers.unpack_fp4_from_uint8(tensors["weight_packed"], *SHAPE, torch.float32)
    found = forward.dequantize(
        codes,
        tensors["weight_scale"].float(),
        args=quantization.QuantizationArgs(**NVFP4_ARGS),
        global_scale=tensors["weight_global_scale"],
    ).numpy()
    np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-24, atol=0)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


MX_ARGS = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "uint8"}


def test_mxfp4_weight__decompressed__is_our_value_bitwise():
    codes, scales = MX(jnp.asarray(weights()), "e2m1")
    tensors = {
        "weight_packed": tensor(numerics.pack_4bit(codes)),
        "weight_scale": tensor(scales),
    }
    found = decompress("MXFP4PackedCompressor", tensors, num_bits=4, **MX_ARGS)
    np.testing.assert_array_equal(found, MX_VALUES(codes, scales, "e2m1"))


def test_mxfp8_weight__decompressed__is_our_value_bitwise():
    codes, scales = MX(jnp.asarray(weights()), "e4m3fn")
    tensors = {"weight": tensor(codes, "float8_e4m3fn"), "weight_scale": tensor(scales)}
    found = decompress("MXFP8QuantizationCompressor", tensors, num_bits=8, **MX_ARGS)
    np.testing.assert_array_equal(found, MX_VALUES(codes, scales, "e4m3fn"))


def test_mxfp4_experts__read_by_transformers__are_our_values_bitwise():
    """The layout of gpt-oss: bytes [experts, out, blocks, 16], values [experts, in, out]."""
    x = jnp.asarray(weights().reshape(4, 256, 1024))
    codes, scales = MX(x, "e2m1")
    _, mxfp4 = oracle("transformers.integrations.mxfp4")
    blocks = numerics.pack_4bit(codes).reshape(4, 256, 32, 16)
    found = mxfp4.convert_moe_packed_tensors(tensor(blocks), tensor(scales)).float().numpy()
    np.testing.assert_array_equal(
        found, np.asarray(MX_VALUES(codes, scales, "e2m1")).transpose(0, 2, 1)
    )
