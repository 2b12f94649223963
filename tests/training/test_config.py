"""The checks of a training config, and the configs that come with the package."""

import math
import re
from pathlib import Path

import pytest

from lowprec_jax.cli.config_file import (
    ConfigError,
    config_names,
    diff_configs,
    dump_config,
    load_config,
    resolve_config_path,
)
from lowprec_jax.training.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RuleConfig,
    TrainConfig,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, resolve_config_path(name), overrides)


def test_train_config__defaults__are_valid():
    assert TrainConfig().precision.recipe == "fp8_delayed"


@pytest.mark.parametrize(
    ("devices", "parts", "batch", "message"),
    [
        (8, 1, 100, r"100 is not divisible by 8 devices \(mesh.data x mesh.fsdp\). Use 96 or"),
        (8, 1, 4, "Use 8\\."),
        (4, 2, 100, r"by 8 = 4 devices \(mesh.data x mesh.fsdp\) x 2 micro-batches.*Use 96 or 104"),
        (1, 5, 12, "by 5 = 1 devices.*Use 10 or 15"),
    ],
)
def test_train_config__batch_not_divisible__gives_the_sizes_around(devices, parts, batch, message):
    mesh, optim = MeshConfig(data=devices), OptimConfig(accumulate=parts)
    with pytest.raises(ValueError, match=message):
        TrainConfig(batch_size=batch, mesh=mesh, optim=optim)


@pytest.mark.parametrize("batch", [96, 104])
def test_train_config__sizes_that_the_message_gives__are_accepted(batch):
    config = TrainConfig(batch_size=batch, mesh=MeshConfig(data=8))
    assert config.batch_size == batch


@pytest.mark.parametrize("steps", [100, 50])
def test_train_config__warmup_not_below_steps__is_an_error(steps):
    with pytest.raises(ValueError, match=rf"warmup_steps 100 is not below steps {steps}.*101"):
        TrainConfig(steps=steps)
    assert TrainConfig(steps=101).steps == 101


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainConfig, {"steps": 0}, "steps is 0; allowed: 1 or more"),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0"),
        (TrainConfig, {"log_every": 0}, "log_every is 0"),
        (TrainConfig, {"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        (TrainConfig, {"eval_every": -1}, "eval_every is -1"),
        (TrainConfig, {"checkpoint_every": -1}, "checkpoint_every is -1"),
        (TrainConfig, {"sample_tokens": -1}, "sample_tokens is -1"),
        (TrainConfig, {"eval_windows": 0}, "eval_windows is 0"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
        (TrainConfig, {"seed": 2**32}, "seed is 4294967296"),
        (TrainConfig, {"name": "a/b"}, "name 'a/b'"),
        (TrainConfig, {"name": ".."}, "name '..'"),
        (TrainConfig, {"name": "a\n"}, "name"),
        (TrainConfig, {"run_dir": "runs/{nam}"}, "run_dir 'runs/{nam}'.*{name}"),
        (TrainConfig, {"run_dir": ""}, "run_dir ''"),
        (TrainConfig, {"sample_prompt": ""}, "sample_prompt is empty"),
        (ModelConfig, {"num_layers": 0}, "num_layers is 0"),
        (ModelConfig, {"num_heads": 0}, "num_heads is 0"),
        (ModelConfig, {"width": -128}, "width is -128"),
        (ModelConfig, {"context": 0}, "context is 0"),
        (ModelConfig, {"mlp_width": 0}, "mlp_width is 0"),
        (ModelConfig, {"num_kv_heads": 0}, "num_kv_heads is 0"),
        (ModelConfig, {"width": 130}, "width 130 is not divisible by num_heads 4. Use 128 or 132"),
        (ModelConfig, {"width": 12}, "= 3 is odd.*Use width 8 or 16"),
        (ModelConfig, {"num_kv_heads": 3}, "4 is not divisible by num_kv_heads 3. .*1, 2, 4"),
        (ModelConfig, {"rope_base": 0.0}, "rope_base is 0.0"),
        (ModelConfig, {"init_scale": math.nan}, "init_scale is nan"),
        (DataConfig, {"source": ""}, "source is empty"),
        (DataConfig, {"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        (DataConfig, {"tokenizer": "bpe", "vocab_size": 256}, "vocab_size 256.*257"),
        (RuleConfig, {"path": "(", "recipe": "none"}, "path '\\('.*regular expression"),
        (RuleConfig, {"path": ".*", "recipe": ""}, "recipe is empty"),
        (PrecisionConfig, {"recipe": ""}, "recipe is empty"),
        (PrecisionConfig, {"history_length": 0}, "history_length is 0"),
        (PrecisionConfig, {"margin": -1}, "margin is -1"),
        (OptimConfig, {"optimizer": "adam"}, "optimizer is 'adam'; use one of 'adamw', 'lion'"),
        (OptimConfig, {"schedule": "wds"}, "schedule is 'wds'; use one of 'cosine'"),
        (OptimConfig, {"decay_fraction": 0.0}, "decay_fraction is 0.0; allowed: more than 0"),
        (OptimConfig, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (OptimConfig, {"learning_rate": math.inf}, "learning_rate is inf"),
        (OptimConfig, {"clip_norm": 0.0}, "clip_norm is 0.0"),
        (OptimConfig, {"warmup_steps": -1}, "warmup_steps is -1"),
        (OptimConfig, {"accumulate": 0}, "accumulate is 0"),
        (OptimConfig, {"final_fraction": 1.1}, "final_fraction is 1.1"),
        (OptimConfig, {"b1": 1.0}, "b1 is 1.0"),
        (OptimConfig, {"b2": math.nan}, "b2 is nan"),
        (OptimConfig, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (MeshConfig, {"data": 0}, "data is 0"),
        (MeshConfig, {"strategy": "gspmd"}, "strategy is 'gspmd'; use one of 'shard_map'"),
        (MeshConfig, {"strategy": "pmap", "fsdp": 2}, '"pmap" is data parallel only'),
        (MeshConfig, {"strategy": "jit", "reduce": "bfloat16"}, 'needs strategy "shard_map"'),
        (MeshConfig, {"reduce": "fp8", "zero1": True}, 'reduce "fp8" needs'),
        (MeshConfig, {"sequence": True}, "set tensor to more than 1"),
    ],
)
def test_configs__bad_value__is_named_with_what_is_allowed(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    ("values", "hidden"),
    [
        ({}, 352),  # 8/3 * 128 = 341.3
        ({"width": 96}, 256),  # 8/3 * 96 is a multiple of 32 already
        ({"mlp": "gelu"}, 512),
        ({"mlp_width": 40}, 40),
    ],
)
def test_model_config__hidden_width__follows_the_mlp(values, hidden):
    assert ModelConfig(**values).hidden_width == hidden


def test_model_config__heads__are_resolved():
    model = ModelConfig(num_heads=4, num_kv_heads=2, width=96)
    assert (model.head_dim, model.kv_heads, ModelConfig().kv_heads) == (24, 2, 4)


def test_train_config__run_path__holds_the_name():
    assert TrainConfig(name="abc").run_path == "runs/abc"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configs__every_file__loads_under_its_own_name_and_says_its_command(path):
    config = load_config(TrainConfig, path)
    assert config.name == path.stem
    assert path.stem in config_names()
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# python train.py")
    assert second == "#"


@pytest.mark.parametrize("base", ["quickstart", "shakespeare_char"])
def test_configs__variants__differ_from_their_base_in_the_precision_only(base):
    fp8 = load(base)
    assert diff_configs(fp8, load(f"{base}_fp32")) == [
        f"name: '{base}' -> '{base}_fp32'",
        "precision.recipe: 'fp8_delayed' -> 'none'",
    ]
    assert diff_configs(fp8, load(f"{base}_bf16")) == [
        f"name: '{base}' -> '{base}_bf16'",
        "model.compute_dtype: 'float32' -> 'bfloat16'",
        "precision.recipe: 'fp8_delayed' -> 'none'",
    ]


def test_configs__shakespeare_char__is_nanogpts_setting():
    config = load("shakespeare_char", "--data.source", "here.txt")
    assert config.data == DataConfig(source="here.txt", tokenizer="char", validation_fraction=0.1)
    assert config.model == ModelConfig(
        num_layers=4, num_heads=4, width=128, context=64, mlp="swiglu", mlp_width=352
    )
    assert config.optim == OptimConfig(
        learning_rate=1e-3, final_fraction=0.1, warmup_steps=100, b2=0.99, weight_decay=0.1
    )
    assert (config.steps, config.batch_size, config.eval_windows) == (2000, 12, None)


def test_dump_config__train_config__round_trips(tmp_path):
    rules = (RuleConfig(path=r"block_\d+/mlp/.*", recipe="none"), RuleConfig(path="", recipe="x"))
    config = TrainConfig(
        steps=200,
        sample_prompt="def f():\n\t",
        precision=PrecisionConfig(rules=rules),
        optim=OptimConfig(learning_rate=3e-5),
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(TrainConfig, path) == config


def test_load_config__override_that_breaks_the_batch__is_a_config_error():
    with pytest.raises(ConfigError, match=r"batch_size 100 .* 8 devices .* Use 96 or 104"):
        load("quickstart", "--batch_size", "100", "--mesh.data", "8")


def test_load_config__two_overrides_that_only_fit_together__are_accepted():
    config = load("quickstart", "--optim.warmup_steps", "5", "--steps", "20")
    assert (config.steps, config.optim.warmup_steps) == (20, 5)


def test_train_config__every_option__has_help(capsys):
    with pytest.raises(SystemExit):
        load("quickstart", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("--") > 45
    # Help stands between the type of an option and its default.
    assert re.findall(r"--[\w.]+ (?:[A-Z]+|\{\S+\}|\{None\}\|[A-Z]+) \(default", shown) == []
