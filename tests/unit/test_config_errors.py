"""Broken configs, in a table: each error names the key, the value that was seen, and what to write instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.errors import ConfigError, Problem

GOOD = """\
run: {name: base}
task:
  name: digits
train:
  epochs: 60
batch:
  initial: 32
  micro_batch: 32
  max: 512
optimizer:
  name: sgd
  lr: 0.05
  momentum: 0.9
"""

SGD = "  name: sgd\n  lr: 0.05\n  momentum: 0.9"
BATCH = "batch:\n  initial: 32\n  micro_batch: 32\n  max: 512\n"
ADAM = "  name: adam\n  lr: 0.05"


@dataclass(frozen=True)
class Case:
    """``old`` of the good file becomes ``new``; without ``old``, ``new`` is added at its end."""

    name: str
    new: str
    key: str
    value: str
    hint: str
    old: str = ""
    line: int | None = None


def added(name: str, key: str, value: str, hint: str, *, beside: str = "") -> Case:
    """``key: value`` in a section of its own at the end of the good file, after what stands ``beside`` it."""
    section, field = key.split(".")
    return Case(name, f"{section}: {{{beside}{', ' * bool(beside)}{field}: {value}}}", key, value, hint)


def changed(name: str, key: str, value: str, hint: str, line: int | None = None) -> Case:
    """The good file's line of this key, with another value."""
    section, field = key.split(".")
    (old,) = [each for each in GOOD.split(f"{section}:\n")[1].splitlines()[:4] if each.startswith(f"  {field}:")]
    return Case(name, f"  {field}: {value}", key, value, hint, old, line)


def sharded(name: str, key: str, value: str, hint: str) -> Case:
    """``key: value`` where the model is sharded."""
    section, field = key.split(".")
    new = f"  epochs: 60\n  parallel: fsdp2\n{section}: {{{field}: {value}}}"
    return Case(name, new, key, value, hint, "  epochs: 60")


def added_to_vr(name: str, field: str, value: str, hint: str) -> Case:
    """``field: value`` for the optimizer vr_sgd."""
    new = f"  name: vr_sgd\n  part_samples: 8\n  {field}: {value}"
    return Case(name, new, f"optimizer.{field}", value, hint, "  name: sgd")


def place(name: str, url: str, hint: str) -> Case:
    """``run.dir: url``."""
    return Case(name, f'run: {{dir: "{url}"}}', "run.dir", json.dumps(url), hint, "run: {name: base}", 1)


CASES = [
    # Names
    Case("misspelt key", "  initail: 32", "batch.initail", "32", "did you mean batch.initial?", "  initial: 32", 7),
    Case("misspelt section", "optimiser:", "optimiser", "lr", "did you mean optimizer?", "optimizer:", 10),
    Case(
        "name from elsewhere", "  learning_rate: 0.05", "optimizer.learning_rate", "0.05", "optimizer.lr", "  lr: 0.05"
    ),
    Case("key in the wrong section", "  warmup_samples: 9", "optimizer.warmup_samples", "9", "schedule.warmup_samples"),
    Case("key of a section at the top", "lr: 0.1", "lr", "0.1", "did you mean optimizer.lr?", line=14),
    Case(
        "key in several sections", "every_samples: 5", "every_samples", "5", "controller.every_samples or evaluation."
    ),
    added("unit left out", "schedule.warmup", "100", "schedule.warmup_samples"),
    place("storage that nobody knows", "s3n://bucket/runs", "did you mean s3://?"),
    place("the memory of one process", "memory://runs", "s3://bucket/runs"),
    place("what is only read", "https://example.com/runs", "s3://bucket/runs"),
    place("a password in a URL", "sftp://me:secret@host/runs", "sftp://bucket/runs; credentials"),
    place("a chain of file systems", "simplecache::s3://bucket/runs", "s3://bucket/runs"),
    place("a bucket left out", "s3://", "write s3://bucket/runs"),
    Case(
        "a scratch folder of a folder",
        "run: {scratch: /tmp/x}",
        "run.scratch",
        "/tmp/x",
        "remove it",
        "run: {name: base}",
        1,
    ),
    changed("unknown task", "task.name", "digit", "did you mean digits?", 3),
    changed("task as a file", "task.name", "my/task.py:make", "my.task:make"),
    changed("task as a dotted name", "task.name", "my.task.make", "my.task:make"),
    changed("optimizer in capitals", "optimizer.name", "AdamW", "did you mean adamw?"),
    added("unknown schedule", "schedule.name", "cosin", "did you mean cosine?"),
    added("unknown rule", "lr_rule.name", "square_root", "sqrt, power"),
    added(
        "unknown policy",
        "controller.policy",
        "noise",
        "decay_to_growth, noise_scale, tradeoff, norm_test, goodput, ",
    ),
    added("nearly a policy", "controller.policy", "trade_off", "did you mean tradeoff?"),
    added("nearly a key", "controller.exchange", "100", "did you mean controller.exchange_rate?"),
    added("unknown mode", "controller.mode", "advice", "did you mean advise?"),
    Case("unknown precision", "  precision: fp16", "train.precision", "fp16", "fp32, bf16", "  epochs: 60"),
    added("unknown estimator", "measure.estimator", "ranks", "micro_batch"),
    added("nearly an estimator", "measure.estimator", "per_sample", "did you mean per_example?"),
    *(
        sharded(name, key, value, hint)
        for name, key, value, hint in (
            ("layers of shards", "measure.estimator", "per_example", "write micro_batch, or split"),
            ("norm layers of shards", "measure.estimator", "norm_layers", "write micro_batch, or split"),
            ("curvature of shards", "measure.curvature_every_samples", "4096", "remove it, or train.parallel: ddp"),
        )
    ),
    Case(
        "shards summed in order",
        "  epochs: 60\n  parallel: fsdp2\n  reproducible: true",
        "train.reproducible",
        "true",
        "in an order that depends on the workers",
        "  epochs: 60",
    ),
    Case(
        "trials on shards",
        f"  epochs: 60\n  parallel: fsdp2\n{BATCH}  find_micro_batch: true",
        "batch.find_micro_batch",
        "true",
        "leave the others waiting",
        f"  epochs: 60\n{BATCH.rstrip()}",
    ),
    Case(
        "shards left unused",
        "  epochs: 60\n  parallel: fsdp2\n  find_unused_parameters: true",
        "train.find_unused_parameters",
        "true",
        "a parameter that no step uses needs no word",
        "  epochs: 60",
    ),
    Case(
        "parts of shards",
        f"  epochs: 60\n  parallel: fsdp2\n{BATCH}optimizer: {{name: clars, lr: 0.1, part_samples: 8}}",
        "optimizer.part_samples",
        "8",
        "choose another optimizer, such as lamb",
        f"  epochs: 60\n{BATCH}optimizer:\n{SGD}",
    ),
    Case(
        "shards in Adam's metric",
        f"  epochs: 60\n  parallel: fsdp2\n{BATCH}optimizer:\n{ADAM}\nmeasure: {{preconditioned: true}}",
        "measure.preconditioned",
        "true",
        "remove it, or train.parallel: ddp",
        f"  epochs: 60\n{BATCH}optimizer:\n{SGD}",
    ),
    Case("nearly fsdp2", "  epochs: 60\n  parallel: fsdp", "train.parallel", "fsdp", "fsdp2", "  epochs: 60"),
    added("left out of micro-batches", "measure.leave_out", "[head]", "write estimator: per_example"),
    added("a calibration of others", "measure.calibration_samples", "4096", "write estimator: norm_layers"),
    added("no calibration", "measure.calibration_samples", "0", "1"),
    added("nearly norm_layers", "measure.estimator", "norm_layer", "did you mean norm_layers?"),
    Case(
        "a calibration beyond the end",
        "  samples: 4096\nmeasure: {estimator: norm_layers}",
        "measure.calibration_samples",
        "8192",
        "write 1024, or measure.estimator: per_example",
        "  epochs: 60",
    ),
    added("unknown groups", "measure.groups", "layer", "did you mean layers?"),
    added("a metric of another optimizer", "measure.preconditioned", "true", "adam, adamw"),
    added("unknown when", "workers.when", "alway", "did you mean always?"),
    # Kinds and units
    Case("thousands as k", "  initial: 10k", "batch.initial", '"10k"', "write 10000,", "  initial: 32", 7),
    Case("a unit behind", "  epochs: 2 epochs", "train.epochs", '"2 epochs"', "write 2,", "  epochs: 60", 5),
    Case("epochs as samples", "  samples: 2 epochs", "train.samples", '"2 epochs"', "train.epochs: 2", "  epochs: 60"),
    Case("separators", "  samples: 1_000 samples", "train.samples", "1_000 samples", "write 1000,", "  epochs: 60"),
    Case("thousands commas", "  initial: 1,024", "batch.initial", '"1,024"', "write 1024,", "  initial: 32"),
    Case("decimal comma", "  lr: 0,05", "optimizer.lr", '"0,05"', "write 0.05", "  lr: 0.05"),
    added("steps for samples", "evaluation.every_samples", "5 steps", "not steps"),
    added("minutes", "workers.resize_cost_s", "2 min", "write 120,"),
    added("per cent", "controller.confidence", "95%", "write 0.95,"),
    added("per cent as a number", "controller.confidence", "95", "write 0.95"),
    changed("quoted number", "batch.initial", '"32"', "write 32, without quotes"),
    changed("a fraction of an epoch", "train.epochs", "1.5", "without a fraction"),
    Case("float for a count", "  samples: 1e6", "train.samples", "1000000.0", "write 1000000", "  epochs: 60"),
    changed("words for a number", "optimizer.lr", "small", "write digits only"),
    changed("boolean for a number", "optimizer.lr", "true", "not numbers"),
    Case("yes", "ledger: yes", "ledger", "yes", "write true"),
    Case("number for a name", "run: {name: 2024}", "run.name", "2024", 'in quotes: "2024"', "run: {name: base}", 1),
    Case(
        "no space after the colon",
        "task:\n  name:digits",
        "task",
        "name:digits",
        "a space after",
        "task:\n  name: digits",
    ),
    Case("value for a section", "workers: 4", "workers", "4", "its keys are initial, min, max"),
    Case("list for a mapping", "  options: [1]", "task.options", "[1]", "must be a mapping", "  name: digits"),
    Case("one beta", "  name: adam\n  betas: [0.9]", "optimizer.betas[1]", "", "betas: [0.9, 0.999]", "  name: sgd"),
    Case("beta as text", "  name: adam\n  betas: [0.9, x]", "optimizer.betas[1]", "x", "digits only", "  name: sgd"),
    Case("flat ramp", "controller: {policy: schedule, ramp: [5, 64]}", "controller.ramp[0]", "5", "ramp: [[20000, 64]"),
    Case(
        "number as an option's name", "  options: {1: a}", "task.options.1", "", 'write "1" in quotes', "  name: digits"
    ),
    Case("infinite option", "  options: {a: {b: .inf}}", "task.options.a.b", ".inf", "finite", "  name: digits"),
    # Ranges
    changed("no learning rate", "optimizer.lr", "0", "more than 0"),
    changed("not a number", "optimizer.lr", ".nan", "finite"),
    changed("momentum of one", "optimizer.momentum", "1.0", "less than 1"),
    Case("clip to nothing", "  max_grad_norm: 0", "train.max_grad_norm", "0", "null: never", "  epochs: 60"),
    changed("empty batch", "batch.initial", "0", "at least 1"),
    added("lag of nothing", "controller.lag_steps", "0", "at least 1"),
    added("growth by nothing", "controller.max_growth", "1.0", "more than 1"),
    added("dead-band below one", "controller.deadband", "0.5", "at least 1"),
    Case("negative seed", "run: {seed: -1}", "run.seed", "-1", "at least 0", "run: {name: base}"),
    added("no checkpoint kept", "checkpoint.keep", "0", "at least 1"),
    added("endless recovery", "recovery.max_failures", "-1", "0: never"),
    Case("run name with a folder", "run: {name: a/b}", "run.name", "a/b", "write a-b; run.dir", "run: {name: base}"),
    Case("run name that climbs", "run: {name: ..}", "run.name", "..", "such as my-run", "run: {name: base}"),
    Case("no run folder", 'run: {dir: ""}', "run.dir", '""', "must not be empty", "run: {name: base}"),
    added("no patience", "workers.patience_s", "0", "more than 0"),
    added("budget of nothing", "budget.worker_hours", "0", "more than 0"),
    added("money without a price", "budget.money", "5.0", "write price_per_worker_hour as well"),
    added("price without money", "budget.price_per_worker_hour", "5.0", "write money as well"),
    # One key against another
    changed("ceiling below", "batch.max", "16", "write 32 or more", 9),
    Case("floor above", "  min: 64", "batch.min", "64", "write 32 or less", "  max: 512"),
    changed("huge micro-batch", "batch.micro_batch", "600", "512 or less"),
    changed("no room to grow", "batch.max", "32", "controller.mode: advise"),
    changed("immeasurable batch", "batch.initial", "1", "write 2 or more"),
    Case("fewer workers than min", "workers: {min: 2, max: 4}", "workers.initial", "1", "lower workers.min"),
    Case("more workers than max", "workers: {initial: 3}", "workers.max", "1", "write 3 or more"),
    Case("idle workers", "workers: {initial: 64, max: 64}", "workers.initial", "64", "write 32 or fewer"),
    added("one and a half GPUs", "workers.gpus_per_worker", "1.5", "write 2"),
    Case("samples and epochs", "  epochs: 60\n  samples: 50000", "train.epochs", "60", "remove one", "  epochs: 60", 5),
    Case("neither samples nor epochs", "  precision: fp32", "train.samples", "", "train.epochs: 10", "  epochs: 60"),
    Case("momentum for adam", "  name: adam", "optimizer.momentum", "0.9", "that uses it: sgd", "  name: sgd", 13),
    Case("betas for sgd", "  betas: [0.9, 0.99]", "optimizer.betas", "[0.9, 0.99]", "uses it: adam, adamw"),
    Case("parts for sgd", "  part_samples: 8", "optimizer.part_samples", "8", "uses it: clars"),
    Case(
        "parts that another micro-batch would change",
        "  max: 512\n  find_micro_batch: true\noptimizer:\n  name: clars\n  part_samples: 8",
        "batch.find_micro_batch",
        "true",
        "optimizer.part_samples that fits in memory",
        "  max: 512\noptimizer:\n  name: sgd",
    ),
    Case("clars without parts", "  name: clars", "optimizer.part_samples", "", "divisor of it", "  name: sgd"),
    Case(
        "parts above the micro-batch",
        "  name: clars\n  part_samples: 33",
        "optimizer.part_samples",
        "33",
        "write 32 or less, or raise batch.micro_batch",
        "  name: sgd",
    ),
    Case(
        "one part alone",
        "  name: clars\n  part_samples: 17",
        "optimizer.part_samples",
        "17",
        "batch.initial, 32, does not make two of them\nwrite 16 or less",
        "  name: sgd",
    ),
    added_to_vr("floor of nothing for r", "ratio_floor", "0", "more than 0"),
    added_to_vr("floor in per cent for r", "ratio_floor", "10", "write 0.1"),
    added_to_vr("average for vr_sgd", "ratio_beta", "0.9", "uses it: vr_adam, vr_lamb"),
    Case(
        "parts of nothing", "  name: clars\n  part_samples: 0", "optimizer.part_samples", "0", "least 1", "  name: sgd"
    ),
    Case("trust for sgd", "  trust: 0.1", "optimizer.trust", "0.1", "that uses it: lars"),
    Case("nesterov alone", "  nesterov: true", "optimizer.nesterov", "true", "momentum: 0.9", "  momentum: 0.9"),
    added("gamma for cosine", "schedule.gamma", "0.5", "uses it: step", beside="name: cosine"),
    added("fraction for constant", "schedule.final_fraction", "0.1", "cosine, linear"),
    Case("step without milestones", "schedule: {name: step}", "schedule.milestones_samples", "", "[20000, 40000]"),
    Case("wsd without decay", "schedule: {name: wsd}", "schedule.decay_samples", "", "a fifth"),
    Case("one_cycle without a rise", "schedule: {name: one_cycle}", "schedule.warmup_samples", "0", "a third"),
    added("milestones in disorder", "schedule.milestones_samples", "[9, 5]", "write [5, 9]", beside="name: step"),
    added(
        "milestone within the warm-up",
        "schedule.milestones_samples",
        "[9]",
        "shorten schedule.warmup_samples",
        beside="name: step, warmup_samples: 50",
    ),
    Case("power without exponent", "lr_rule: {name: power}", "lr_rule.exponent", "", "between 0.5"),
    added("exponent for linear", "lr_rule.exponent", "0.5", "noise_scale", beside="name: linear"),
    Case("surge without its peak", "lr_rule: {name: surge}", "lr_rule.peak_batch", "", "sqrt suits adam"),
    added("peak for the root", "lr_rule.peak_batch", "512", "uses it: surge", beside="name: sqrt"),
    added("floor for auto", "lr_rule.floor", "0.5", "uses it: surge"),
    added("floor of nothing", "lr_rule.floor", "0", "more than 0", beside="name: surge, peak_batch: 512"),
    added("floor in per cent", "lr_rule.floor", "50", "write 0.5", beside="name: surge, peak_batch: 512"),
    added("peak for a rule of one's own", "lr_rule.peak_batch", "512", "exponent alone", beside="name: 'a.b:c'"),
    added("exponent for adascale", "lr_rule.exponent", "0.5", "uses it: power, noise_scale", beside="name: adascale"),
    Case("auto for an unknown family", "  name: a.b:Lion", "lr_rule.name", "auto", "linear suits sgd", "  name: sgd"),
    added("sde for sgd", "lr_rule.name", "sde", "sqrt for adam-like"),
    Case(
        "sde beyond its limit",
        "  initial: 32\n  micro_batch: 32\n  max: 320\noptimizer:\n" + ADAM + "\nlr_rule: {name: sde}",
        "batch.max",
        "320",
        "write 319 or less",
        GOOD[GOOD.index("  initial") : -1],
        9,
    ),
    Case(
        "betas twice",
        f"{ADAM}\nlr_rule: {{name: sde, in_samples: [betas]}}",
        "lr_rule.in_samples",
        "[betas]",
        "take betas out",
        SGD,
    ),
    added("betas of sgd in samples", "lr_rule.in_samples", "[betas]", "use adam, adamw, lamb, lans"),
    added("decay of sgd in samples", "lr_rule.in_samples", "[weight_decay]", "part of the gradient or of the layer's"),
    Case("no such memory", "lr_rule: {in_samples: [betta]}", "lr_rule.in_samples[0]", "betta", "did you mean betas?"),
    Case(
        "nothing like a memory",
        "lr_rule: {in_samples: [betas, xyz]}",
        "lr_rule.in_samples[1]",
        "xyz",
        "must be one of momentum, betas, weight_decay",
    ),
    added("momentum twice", "lr_rule.in_samples", "[momentum, momentum]", "write [momentum]"),
    added("second moment of sgd", "lr_rule.second_moment", "rescale", "use adam, adamw, lamb"),
    Case(
        "second moment of lans",
        "  name: lans\n  lr: 0.05\nlr_rule: {second_moment: rescale}",
        "lr_rule.second_moment",
        "rescale",
        "brought to length one",
        SGD,
    ),
    added("ramp into the past", "lr_rule.ramp_samples", "-1", "at least 0"),
    added("ramp without its policy", "controller.ramp", "[[9, 64]]", "policy: schedule"),
    Case(
        "a constant that is missing",
        "controller: {policy: expected_smoothness, smoothness: 4, max_smoothness: 9, accuracy: 0.1}",
        "controller.strong_convexity",
        "",
        "smallest eigenvalue",
    ),
    added(
        "the worst sample smoother than the mean",
        "controller.max_smoothness",
        "3.0",
        "write 4 or more",
        beside="policy: expected_smoothness, smoothness: 4, strong_convexity: 0.1, accuracy: 0.1",
    ),
    added("a constant of another policy", "controller.smoothness", "4.0", "policy: expected_smoothness"),
    added("half a price", "controller.price_per_sample", "0.1", "price_per_worker_hour", beside="policy: tradeoff"),
    added("the other half", "controller.price_per_worker_hour", "2.0", "ratio", beside="policy: tradeoff"),
    added(
        "a price beside a rate",
        "controller.price_per_sample",
        "0.1",
        "remove one of them",
        beside="policy: tradeoff, exchange_rate: 9, price_per_worker_hour: 2",
    ),
    added("a price of nothing", "controller.price_per_worker_hour", "0", "more than 0", beside="policy: tradeoff"),
    added("price for another policy", "controller.price_per_sample", "0.1", "policy: tradeoff"),
    Case(
        "cost on workers that stay",
        "controller: {policy: goodput, objective: cost}",
        "controller.objective",
        "cost",
        "choose the same batch",
    ),
    Case(
        "cost without resizes",
        "controller: {policy: goodput, objective: 0.5}\nworkers: {max: 4, when: never}",
        "controller.objective",
        "0.5",
        "workers.when not never",
    ),
    added("goodput as advice", "controller.mode", "advise", "all are of one length", beside="policy: goodput"),
    added("times as advice", "controller.mode", "advise", "give controller.exchange_rate", beside="policy: tradeoff"),
    added("unknown objective", "controller.objective", "money", "did you mean cost?", beside="policy: goodput"),
    added("objective out of range", "controller.objective", "1.5", "from 0 (time)", beside="policy: goodput"),
    added("objective as true", "controller.objective", "true", "from 0 (time)", beside="policy: goodput"),
    added("objective elsewhere", "controller.objective", "cost", "policy: goodput"),
    added("rate for goodput", "controller.exchange_rate", "9.0", "policy: tradeoff", beside="policy: goodput"),
    Case(
        "no branches",
        "controller: {policy: branched, branch_samples: 4096}",
        "controller.branch_every_samples",
        "",
        "write branch_every_samples",
    ),
    Case(
        "branches too short",
        "controller: {policy: branched, branch_every_samples: 4096, branch_samples: 255}",
        "controller.branch_samples",
        "255",
        "write 256 or more",
    ),
    Case(
        "halved parts",
        "measure: {estimator: split}\noptimizer: {name: clars, lr: 0.1, part_samples: 8}",
        "measure.estimator",
        "split",
        "micro_batch, which compares the parts",
        "optimizer:\n  name: sgd\n  lr: 0.05\n  momentum: 0.9",
    ),
    added("a tolerance of nothing", "controller.branch_tolerance", "0.1", "policy: branched"),
    Case("no theta", "controller: {policy: norm_test}", "controller.theta", "", "write theta: 0.5"),
    added("rate without its policy", "controller.exchange_rate", "100.0", "policy: tradeoff"),
    added("theta for tradeoff", "controller.theta", "0.5", "norm_test", beside="policy: tradeoff, exchange_rate: 9"),
    added("rate of nothing", "controller.exchange_rate", "0", "more than 0", beside="policy: tradeoff"),
    added("kappa for the norm test", "controller.kappa", "2.0", "set theta", beside="policy: norm_test, theta: 0.5"),
    Case("policy without its ramp", "controller: {policy: schedule}", "controller.ramp", "", "write ramp: [["),
    added("kappa for a ramp", "controller.kappa", "2.0", "noise_scale", beside="policy: schedule, ramp: [[9, 64]]"),
    added("kappa for a batch that stays", "controller.kappa", "2.0", "noise_scale", beside="policy: fixed"),
    added("kappa for a planned decay", "controller.kappa", "2.0", "noise_scale", beside="policy: decay_to_growth"),
    Case(
        "a rule beside the exchange's own",
        "schedule: {name: cosine}\ncontroller: {policy: decay_to_growth}\nlr_rule: {name: linear}",
        "lr_rule.name",
        "linear",
        "write lr_rule.name: auto",
    ),
    Case(
        "no rule beside the exchange's own",
        "schedule: {name: cosine}\ncontroller: {policy: decay_to_growth}\nlr_rule: {name: constant}",
        "lr_rule.name",
        "constant",
        "would not use this one",
    ),
    Case(
        "a decay within the dead-band",
        "schedule: {name: cosine, final_fraction: 0.7}\ncontroller: {policy: decay_to_growth}",
        "controller.deadband",
        "1.5",
        "from 32 to 46 at most, and nearer than the dead-band nothing changes\nwrite 1.437 or less, or lower "
        "schedule.final_fraction",
    ),
    Case(
        "milestones within the dead-band",
        "schedule: {name: step, milestones_samples: [9, 99], gamma: 0.9}\n"
        "controller: {policy: decay_to_growth, deadband: 1.3}",
        "controller.deadband",
        "1.3",
        "write 1.25 or less, or lower schedule.gamma",
    ),
    Case(
        "a decay by less than a sample",
        "schedule: {name: linear, final_fraction: 0.99}\ncontroller: {policy: decay_to_growth, deadband: 1.0}",
        "controller.deadband",
        "1.0",
        "from 32 to 32 at most",
    ),
    Case(
        "growth from an unknown family",
        "  name: a.b:Lion\n  lr: 0.05\nschedule: {name: cosine}\ncontroller: {policy: decay_to_growth}",
        "controller.policy",
        "decay_to_growth",
        "schedule with a ramp",
        "  name: sgd\n  lr: 0.05\n  momentum: 0.9",
    ),
    Case("no decay to replace", "controller: {policy: decay_to_growth}", "schedule.name", "constant", "never decays"),
    Case(
        "a gamma that does not decay",
        "schedule: {name: step, milestones_samples: [9], gamma: 1.0}\ncontroller: {policy: decay_to_growth}",
        "schedule.name",
        "step",
        "gamma below 1",
    ),
    Case(
        "no room for a decay",
        "  max: 32\nschedule: {name: linear}\ncontroller: {policy: decay_to_growth}",
        "batch.max",
        "32",
        "has no room",
        "  max: 512",
    ),
    added("ramp in disorder", "controller.ramp", "[[9, 64], [5, 128]]", "in order", beside="policy: schedule"),
    added("ramp that falls", "controller.ramp", "[[5, 128], [9, 64]]", "shrink: true", beside="policy: schedule"),
    added("ramp above the ceiling", "controller.ramp", "[[9, 1024]]", "batch.max", beside="policy: schedule"),
    # One key against the length of the run
    Case(
        "curvature beyond the end",
        "  samples: 4000\nmeasure: {curvature_every_samples: 5000}",
        "measure.curvature_every_samples",
        "5000",
        "write 1000, or leave it out",
        "  epochs: 60",
    ),
    Case("first batch takes all", "  samples: 20", "batch.initial", "32", "train.samples is 20", "  epochs: 60"),
    Case(
        "endless warm-up",
        "  samples: 5000\nschedule: {warmup_samples: 5000}",
        "schedule.warmup_samples",
        "5000",
        "a tenth",
        "  epochs: 60",
    ),
    Case(
        "warm-up and decay too long",
        "  samples: 5000\nschedule: {name: wsd, warmup_samples: 3000, decay_samples: 3000}",
        "schedule.decay_samples",
        "3000",
        "train.samples is 5000",
        "  epochs: 60",
    ),
    Case(
        "ramp of the rate without end",
        "  samples: 5000\nlr_rule: {ramp_samples: 5000}",
        "lr_rule.ramp_samples",
        "5000",
        "train.samples is 5000",
        "  epochs: 60",
    ),
    Case("no decision in time", "  samples: 1000", "controller.every_samples", "1024", "write 62", "  epochs: 60"),
    Case(
        "ramp beyond the end",
        "  samples: 5000\ncontroller: {policy: schedule, ramp: [[6000, 64]]}",
        "controller.ramp",
        "[[6000, 64]]",
        "never reached",
        "  epochs: 60",
    ),
    # YAML itself
    Case("key given twice", "  initial: 64", "batch.initial", "64", "first on line 7", "  max: 512", 9),
    Case("section given twice", "task: {name: char_lm}", "task", "", "first on line 2", line=14),
    Case("foreign tag", "  options: !!python/name:os.system x", "task.options", "python/name", "tag", "  name: digits"),
    Case("endless alias", "  options: &a {b: *a}", "task.options.b", "*alias", "contain itself", "  name: digits"),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "case.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, overrides: list[str] | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or [])
    problems = [problem for problem in caught.value.problems if isinstance(problem, Problem)]
    assert len(problems) == len(caught.value.problems)
    assert str(caught.value) == "\n\n".join(str(problem) for problem in problems)
    return problems


def test_the_file_that_the_table_breaks_is_good(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD)).batch.max == 512


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_config_is_refused_with_key_value_and_hint(case: Case, tmp_path: Path) -> None:
    assert not case.old or GOOD.count(case.old + "\n") == 1
    text = GOOD.replace(case.old + "\n", case.new + "\n") if case.old else GOOD + case.new + "\n"
    path = write(tmp_path, text)
    [problem] = [p for p in problems_of(path) if p.key == case.key]
    words = str(problem)
    assert words.startswith(f"{path}")
    assert f"{case.key}:" in words
    assert case.value in (problem.value or "")
    assert (problem.value is None) == (case.value == "")
    assert case.hint in f"{problem.rule}\n{problem.fix}"
    if case.line is not None:
        assert problem.line == case.line
        assert f"line {case.line}" in words


@pytest.mark.parametrize(
    ("content", "line", "hint"),
    [
        (b"", None, "the file is empty"),
        (b"# only a comment\n", None, "the file is empty"),
        (b"- task\n- train\n", 1, "must hold sections"),
        (b"just words\n", 1, "must hold sections"),
        (b"task:\n\tname: digits\n", 2, "with spaces, not with tabs"),
        (b"task:\n  name: digits\n train: 3\n", 3, "check the indentation"),
        (b"task:\n  name:digits\n  options: {}\n", 3, "a space after the colon"),
        (b"task: {name: digits\n", 2, "cannot be read as YAML"),
        (b"task: {name: digits}\n---\ntrain: {epochs: 1}\n", 2, "another"),
        (b"task: *missing\n", 1, "undefined alias"),
        (b"task:\n  name: caf\xe9\n", 2, "byte 0xe9"),
        ("task:\n".encode("utf-16"), 1, "save the file as UTF-8"),
        (b"task:\n  name: a\x00b\n", 2, "does not allow"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused_with_its_line(
    content: bytes, line: int | None, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "case.yaml"
    path.write_bytes(content)
    [problem] = problems_of(path)
    assert problem.source == str(path)
    assert problem.line == line
    assert hint in str(problem)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    [missing] = problems_of(tmp_path / "none.yaml")
    assert "none.yaml" in str(missing)
    assert "No such file" in str(missing)
    [folder] = problems_of(tmp_path)
    assert "is a folder" in str(folder)


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("batch.initial", None, "section.key=value"),
        ("=5", None, "section.key=value"),
        ("batch..initial=5", None, "section.key=value"),
        ("batch.initail=5", "batch.initail", "did you mean batch.initial?"),
        ("batch.initial=10k", "batch.initial", "write 10000"),
        ("batch.initial.x=5", "batch.initial.x", "set batch.initial itself"),
        ("optimizer.betas=[0.9", None, "cannot be read as YAML"),
        ("batch=5", "batch", "must be a section"),
        ("optimizer.name=adam", "optimizer.momentum", "that uses it: sgd"),
        ("batch.initial=1024", "batch.max", "below batch.initial, 1024"),
        ("optimizer.lr={a: 1, a: 2}", "optimizer.lr.a", "given twice"),
    ],
)
def test_a_bad_override_is_named_as_the_source(override: str, key: str | None, hint: str, tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, GOOD), ["run.seed=7", override])
    [problem] = [p for p in problems if p.key == key]
    assert problem.source == f"--set {override}"
    assert problem.line is None
    assert hint in str(problem)


def test_all_problems_are_listed_in_the_order_of_the_file_then_the_overrides(tmp_path: Path) -> None:
    text = GOOD.replace("digits", "digit").replace("initial: 32", "initial: 10k").replace("lr: 0.05", "lr: 1\n  lr: -1")
    problems = problems_of(write(tmp_path, text), ["train.epochs=0", "nothing"])
    assert [p.key for p in problems] == ["task.name", "batch.initial", "optimizer.lr", None, "train.epochs"]
    assert [p.line for p in problems] == [3, 7, 13, None, None]


def test_a_missing_section_lists_what_it_must_hold(tmp_path: Path) -> None:
    problems = {p.key: str(p) for p in problems_of(write(tmp_path, "ledger: false\n"))}
    assert set(problems) == {"task", "train", "batch", "optimizer"}
    assert "batch.initial, batch.micro_batch" in problems["batch"]
    assert "train.epochs" in problems["train"]


def test_a_file_name_that_cannot_name_a_run_asks_for_a_run_name(tmp_path: Path) -> None:
    path = tmp_path / "my config (2).yaml"
    path.write_text(GOOD.replace("run: {name: base}\n", ""), encoding="utf-8")
    [problem] = problems_of(path)
    assert problem.key == "run.name"
    assert "write my-config-2" in str(problem)
    assert load_config(path, ["run.name=mine"]).run.name == "mine"
