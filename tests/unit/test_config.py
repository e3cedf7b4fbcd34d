"""Reading, resolving and writing a config: what is given is what a run gets, and what is written reads back equal."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import BaseModel, ValidationError

from orchestrator.config import RunConfig, load_config, to_yaml
from orchestrator.config.controlling import POLICIES as POLICY_NAMES
from orchestrator.config.error_messages import model_in
from orchestrator.config.optimization import LR_RULE_KEYS
from orchestrator.core.lr_rules import LR_RULES
from orchestrator.core.policies import POLICIES
from orchestrator.core.policy_inputs import PolicyInputs
from orchestrator.errors import CheckpointError, ConfigError, GroundswellError, Problem
from orchestrator.runtime.rules import rules_from
from orchestrator.types import NoiseStats, Verdict

MINIMAL = """\
task: {name: digits}
train: {epochs: 3}
batch: {initial: 32, micro_batch: 16, max: 512}
optimizer: {name: sgd, lr: 0.1}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "first-try.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def write(folder: Path, text: str) -> Path:
    path = folder / "case.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def sections() -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in RunConfig.model_fields.items():
        if model := model_in(field.annotation):
            found.append((name, model))
    return found


def test_four_sections_are_enough_and_the_rest_has_defaults(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.run.name == "first-try"
    assert (config.run.dir, config.run.seed) == ("runs", 0)
    assert (config.batch.min, config.batch.max) == (32, 512)
    assert (config.workers.initial, config.workers.max, config.workers.when) == (1, 1, "saves_time")
    assert (config.controller.mode, config.controller.policy, config.controller.lag_steps) == ("act", "noise_scale", 4)
    assert config.evaluation.every_samples is None
    assert config.checkpoint.keep == 2
    assert config.recovery.max_failures == 3
    assert config.ledger is False


def test_every_key_of_the_published_shape_exists_and_no_other() -> None:
    shape = {
        "run": "name dir scratch upload_patience_s seed",
        "task": "name options",
        "train": "samples epochs max_grad_norm precision ema_half_life_samples reproducible parallel "
        "find_unused_parameters",
        "batch": "initial micro_batch max min find_micro_batch",
        "optimizer": "name lr momentum trust nesterov betas eps weight_decay part_samples ratio_floor ratio_beta",
        "schedule": "name warmup_samples start_fraction final_fraction milestones_samples gamma decay_samples",
        "lr_rule": "name exponent peak_batch floor ramp_samples in_samples second_moment",
        "controller": "mode policy every_samples lag_steps cooldown_samples deadband max_growth kappa exchange_rate "
        "price_per_worker_hour price_per_sample objective smoothness max_smoothness strong_convexity accuracy "
        "branch_every_samples branch_samples branch_tolerance theta shrink ramp half_life_samples confidence",
        "measure": "estimator calibration_samples every_steps groups preconditioned curvature_every_samples leave_out",
        "workers": "initial min max micro_batches_each when resize resize_cost_s patience_s retry_samples "
        "cpus_per_worker gpus_per_worker threads",
        "data": "loader_workers prefetch pin_memory seed_each_sample",
        "evaluation": "every_samples",
        "checkpoint": "every_samples keep asynchronous",
        "recovery": "max_failures hang_timeout_s storage_patience_s accept_changed",
        "cluster": "image image_pull_secrets name namespace service_account head worker_groups storage "
        "active_deadline_s pre_running_deadline_s ttl_s backoff_limit idle_timeout_s kueue pod_monitor env secret_env "
        "labels annotations",
        "tracking": "mlflow_experiment wandb_project wandb_entity run_name tags every_s",
        "budget": "worker_hours money price_per_worker_hour",
    }
    assert {name: set(model.model_fields) for name, model in sections()} == {
        k: set(v.split()) for k, v in shape.items()
    }
    assert set(RunConfig.model_fields) == {*shape, "ledger"}


@pytest.mark.parametrize(("section", "model"), sections())
def test_every_key_is_described_with_its_unit(section: str, model: type[BaseModel]) -> None:
    for key, field in model.model_fields.items():
        assert re.match(r"\[[a-zA-Z -]+(, [a-z]+)?\] \S.{8,}", field.description or ""), f"{section}.{key}"
        for suffix, unit in (("_samples", "samples"), ("_steps", "steps"), ("_s", "s")):
            if key.endswith(suffix):
                assert unit in (field.description or "").split("]")[0], f"{section}.{key}"


def test_the_config_knows_the_policies_and_rules_that_there_are() -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    assert ["auto", *LR_RULES] == list(LR_RULE_KEYS)
    for names, field in ((POLICIES, ("controller", "policy")), (LR_RULE_KEYS, ("lr_rule", "name"))):
        described = dict(sections())[field[0]].model_fields[field[1]].description or ""
        assert all(re.search(rf"\b{name}\b", described) for name in names)


def test_a_config_cannot_be_changed(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.batch.initial = 64


def test_a_config_built_in_python_obeys_the_same_rules() -> None:
    with pytest.raises(ValueError, match="ceiling is below"):
        RunConfig.model_validate({**yaml.safe_load(MINIMAL), "batch": {"initial": 32, "micro_batch": 8, "max": 16}})


@pytest.mark.parametrize(
    ("written", "lr"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("+.5", 0.5), ("5.", 5.0), ("2", 2.0), ("1.5e2", 150.0)]
)
def test_numbers_are_read_as_yaml_1_2_does(minimal: Path, written: str, lr: float) -> None:
    minimal.write_text(MINIMAL.replace("lr: 0.1", f"lr: {written}"), encoding="utf-8")
    assert load_config(minimal).optimizer.lr == lr


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "n", "2024-01-01", "1:30", "1_000", "0b1", "<<", "="])
def test_text_that_yaml_1_1_would_convert_stays_text(minimal: Path, word: str) -> None:
    config = load_config(minimal, [f"task.options.word={word}"])
    assert config.task.options == {"word": word}


def test_integers_are_decimal_unless_marked(minimal: Path) -> None:
    config = load_config(minimal, ["task.options.numbers=[017, 0o17, 0x1F, -3]"])
    assert config.task.options["numbers"] == [17, 15, 31, -3]


def test_an_empty_section_means_its_defaults(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "checkpoint:\n#  keep: 9\n", encoding="utf-8")
    assert load_config(minimal).checkpoint.keep == 2


def test_null_means_not_given(minimal: Path) -> None:
    config = load_config(minimal, ["train.epochs=null", "train.samples=5000", "batch.min=null", "optimizer.momentum="])
    assert (config.train.samples, config.train.epochs) == (5000, None)
    assert config.batch.min == 32
    assert config.optimizer.momentum == 0.0


def test_anchors_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    text = MINIMAL + "evaluation: {every_samples: &often 512}\ncheckpoint: {every_samples: *often}\n"
    path = tmp_path / "case.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config(path).checkpoint.every_samples == 512


def test_overrides_are_typed_like_the_file_and_the_last_one_wins(minimal: Path) -> None:
    config = load_config(
        minimal,
        ["optimizer.name=adam", "optimizer.betas=[0.8, 0.9]", "run.seed=1", "run.seed=2", "ledger=true", "run.name=b"],
    )
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.run.seed, config.ledger, config.run.name) == (2, True, "b")


def test_options_reach_the_task_as_plain_data(minimal: Path) -> None:
    config = load_config(minimal, ["task.options.a.b=[1, 1.5, true, null, x]"])
    assert config.task.options == {"a": {"b": [1, 1.5, True, None, "x"]}}


def test_keys_of_other_optimizers_and_schedules_are_absent_not_zero(minimal: Path) -> None:
    config = load_config(minimal, ["optimizer.name=adamw", "schedule.name=cosine"])
    assert config.optimizer.settings() == {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    assert config.schedule.settings() == {"name": "cosine", "warmup_samples": 0, "final_fraction": 0.0}
    assert config.optimizer.momentum is None
    assert config.schedule.gamma is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lars", {"momentum": 0.9, "trust": 0.001, "weight_decay": 0.0}),
        ("lamb", {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}),
        ("lans", {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}),
    ],
)
def test_layer_wise_optimizers_have_their_own_keys_and_defaults(
    minimal: Path, name: str, expected: dict[str, object]
) -> None:
    assert load_config(minimal, [f"optimizer.name={name}", "optimizer.lr=1.0"]).optimizer.settings() == {
        "lr": 1.0,
        **expected,
    }


def test_keys_of_other_policies_and_rules_are_absent_and_not_written(minimal: Path) -> None:
    config = load_config(minimal)
    absent = [config.controller.exchange_rate, config.controller.theta, config.lr_rule.peak_batch, config.lr_rule.floor]
    assert absent == [None] * 4
    assert not re.search("exchange_rate|theta|peak_batch|floor:", to_yaml(config, comments=False))


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        (["controller.policy=tradeoff", "controller.exchange_rate=1000"], "  exchange_rate: 1000.0\n"),
        (["controller.policy=tradeoff"], "  policy: tradeoff\n"),
        (
            ["controller.policy=tradeoff", "controller.price_per_worker_hour=2", "controller.price_per_sample=0"],
            "  price_per_worker_hour: 2.0\n  price_per_sample: 0.0\n",
        ),
        (
            [
                "controller.policy=expected_smoothness",
                "controller.smoothness=4",
                "controller.max_smoothness=40",
                "controller.strong_convexity=0.1",
                "controller.accuracy=0.01",
            ],
            "  strong_convexity: 0.1\n  accuracy: 0.01\n",
        ),
        (["controller.policy=goodput"], "  objective: time\n"),
        (["controller.policy=goodput", "controller.objective=cost", "workers.max=2"], "  objective: cost\n"),
        (["controller.policy=goodput", "controller.objective=0.25", "workers.max=2"], "  objective: 0.25\n"),
        (["controller.policy=norm_test", "controller.theta=0.5"], "  theta: 0.5\n"),
        (["lr_rule.name=surge", "lr_rule.peak_batch=2048"], "  peak_batch: 2048\n  floor: 0.5\n"),
        (["controller.policy=my.own:make", "controller.theta=3", "controller.ramp=[[9, 64]]"], "  theta: 3.0\n"),
    ],
)
def test_what_a_policy_or_rule_needs_is_read_written_and_becomes_rules(minimal: Path, overrides, written) -> None:
    config = load_config(minimal, overrides)
    text = to_yaml(config, comments=False)
    assert written in text
    minimal.write_text(text, encoding="utf-8")
    assert load_config(minimal) == config
    if "my.own" not in text:
        rules = rules_from(config, dataset_size=10**6)
        stats = NoiseStats(verdict=Verdict.MEASURED, noise_scale=1e6, low=1e6, high=1e6, grad_sq=1.0)
        assert rules.policy(PolicyInputs(stats=stats, batch=32, samples_seen=0)).target_batch == 64
        assert rules.lr_rule(1.0, noise_scale=None, base_batch=32) == 1.0


def test_an_imported_name_may_use_any_key_of_its_section(minimal: Path) -> None:
    config = load_config(
        minimal, ["optimizer.name=my.optim:Lamb", "optimizer.betas=[0.9, 0.99]", "lr_rule.name=sqrt", "task.name=a:b.c"]
    )
    assert config.optimizer.settings() == {"lr": 0.1, "betas": (0.9, 0.99)}


@pytest.mark.parametrize(
    "overrides",
    [
        ["controller.mode=advise", "batch.max=32"],
        ["controller.policy=fixed", "batch.max=32"],
        ["batch.max=32", "batch.min=8", "controller.shrink=true"],
        ["batch.micro_batch=64"],
        ["batch.initial=1", "controller.policy=fixed"],
        ["controller.policy=schedule", "controller.ramp=[[1000, 64], [2000, 512]]"],
        ["controller.policy=schedule", "controller.ramp=[[1000, 64], [2000, 32]]", "controller.shrink=true"],
        ["train.epochs=null", "train.samples=100", "controller.policy=fixed"],
        ["optimizer.nesterov=true", "optimizer.momentum=0.9"],
        ["schedule.name=one_cycle", "schedule.warmup_samples=100"],
        ["workers.gpus_per_worker=0.5", "workers.cpus_per_worker=2"],
    ],
)
def test_unusual_but_sensible_configs_are_not_refused(minimal: Path, overrides: list[str]) -> None:
    assert load_config(minimal, overrides).batch.micro_batch >= 1


VARIANTS: list[list[str]] = [
    [],
    ["optimizer.name=adamw", "optimizer.eps=1e-12"],
    ["optimizer.name=adam", "optimizer.betas=[0.5, 0.75]"],
    ["optimizer.name=lars", "optimizer.trust=0.01", "optimizer.momentum=0.5"],
    ["optimizer.name=lamb", "optimizer.weight_decay=0"],
    ["optimizer.name=lans", "optimizer.eps=1e-9"],
    ["schedule.name=step", "schedule.milestones_samples=[5000, 9000]"],
    ["schedule.name=wsd", "schedule.decay_samples=500", "schedule.warmup_samples=10"],
    ["schedule.name=one_cycle", "schedule.warmup_samples=10"],
    ["lr_rule.name=power", "lr_rule.exponent=0.7"],
    ["lr_rule.ramp_samples=512", "lr_rule.in_samples=[momentum]"],
    ["optimizer.name=adamw", "optimizer.momentum=null", "lr_rule.name=sde", "lr_rule.second_moment=rescale",
     "batch.max=319", "lr_rule.in_samples=[weight_decay]"],
    ["controller.policy=schedule", "controller.ramp=[[1000, 64], [2000, 512]]"],
    ["optimizer.name=a.b:C", "lr_rule.name=d:e", "controller.policy=f:g", "schedule.name=h:i", "task.name=j:k.l"],
]  # fmt: skip


@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_the_resolved_file_reads_back_equal(minimal: Path, overrides: list[str], comments: bool) -> None:
    config = load_config(minimal, overrides)
    copy = minimal.with_name("copy.yaml")
    copy.write_text(to_yaml(config, comments=comments), encoding="utf-8")
    assert load_config(copy) == config


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**32 - 1),
    initial=st.integers(2, 10**6),
    growth=st.integers(1, 10**6),
    folder=st.text(min_size=1).filter(str.isprintable),
    options=st.dictionaries(st.text(), PLAIN, max_size=4),
    clip=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_any_values_read_back_equal(
    minimal: Path,
    lr: float,
    seed: int,
    initial: int,
    growth: int,
    folder: str,
    options: dict[str, object],
    clip: float | None,
) -> None:
    config = RunConfig.model_validate(
        {
            "run": {"name": "any", "seed": seed, "dir": folder},
            "task": {"name": "digits", "options": options},
            "train": {"epochs": 1, "max_grad_norm": clip},
            "batch": {"initial": initial, "micro_batch": 1, "max": initial + growth},
            "optimizer": {"name": "sgd", "lr": lr},
        }
    )
    for comments in (True, False):
        minimal.write_text(to_yaml(config, comments=comments), encoding="utf-8")
        assert load_config(minimal) == config


def test_other_yaml_readers_see_the_same_values_in_the_resolved_file(minimal: Path) -> None:
    options = "{small: 1e-08, large: 1e+20, word: 'yes', number: '12', time: '1:30', date: '2024-01-01', none: 'null'}"
    config = load_config(minimal, [f"task.options={options}", "optimizer.lr=1e-7"])
    read = yaml.safe_load(to_yaml(config))
    assert read["task"]["options"] == config.task.options
    assert read["optimizer"]["lr"] == 1e-7


def test_the_resolved_file_explains_every_key_it_holds(minimal: Path) -> None:
    text = to_yaml(load_config(minimal), comments=True)
    for line_before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if re.match(r"  \w+:", line):
            assert line_before.startswith("  # "), line
    assert "# " not in to_yaml(load_config(minimal), comments=False)


def test_configs_and_errors_travel_between_processes(minimal: Path) -> None:
    config = load_config(minimal)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["optimizer.lr=-1", "batch.initial=x"])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, ConfigError)
    assert isinstance(copy, ValueError)
    assert isinstance(copy, GroundswellError)
    assert copy.problems == caught.value.problems
    assert str(copy) == str(caught.value)
    assert len(copy.problems) == 2
    assert all(isinstance(problem, Problem) for problem in copy.problems)
    other = pickle.loads(pickle.dumps(CheckpointError("torn")))
    assert isinstance(other, CheckpointError)
    assert str(other) == "torn"


def test_reading_a_config_needs_neither_torch_nor_ray() -> None:
    code = "import sys, orchestrator.config; print(*sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
