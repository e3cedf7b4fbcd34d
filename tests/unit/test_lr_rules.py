"""The learning rate's factor: closed forms, AdaScale's gain, and what is refused."""

import pytest
from hypothesis import given, strategies as st

from orchestrator.core.lr_rules import build_rule

ratios = st.floats(1e-3, 1e3)
SAME = ("noise_scale", "adascale")


@pytest.mark.parametrize(
    ("name", "exponent", "expected"),
    [("constant", None, 1.0), ("linear", None, 4.0), ("sqrt", None, 2.0), ("power", 0.75, 4.0**0.75)],
)
def test_rules_of_the_ratio_alone(name, exponent, expected) -> None:
    rule = build_rule(name, exponent=exponent)
    assert rule(4.0, noise_scale=None, base_batch=8) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("exponent", "expected"), [(None, 5.5), (0.5, 2.345207879911715)])
def test_noise_scale_rule_at_a_noise_scale_of_1000_from_100_to_1000(exponent, expected) -> None:
    rule = build_rule("noise_scale", exponent=exponent)
    assert rule(10.0, noise_scale=1000.0, base_batch=100) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", SAME)
@given(ratios, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 4096))
def test_noise_scale_rule_is_the_gain_of_adascale(name, ratio, variance, signal, base_batch) -> None:
    """Johnson et al. 2020: (s2 + m2) / (s2 / k + m2), s2 the variance of the mean of a base batch, m2 = |G|^2."""
    gain = (variance + signal) / (variance / ratio + signal)
    rule = build_rule(name)
    found = rule(ratio, noise_scale=variance * base_batch / signal, base_batch=base_batch)
    assert found == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize("name", SAME)
def test_adascales_gain_at_equal_signal_and_variance_is_one_and_a_half_for_three_times_the_batch(name) -> None:
    assert build_rule(name)(3.0, noise_scale=64.0, base_batch=64) == pytest.approx(1.5, rel=1e-15)


def test_noise_scale_rule_goes_from_constant_to_linear() -> None:
    rule = build_rule("noise_scale")
    assert rule(8.0, noise_scale=0.0, base_batch=32) == 1.0
    assert rule(8.0, noise_scale=1e15, base_batch=32) == pytest.approx(8.0, rel=1e-9)


@given(ratios, st.none() | st.floats(0, 1e9), st.integers(1, 4096))
def test_adascale_is_another_name_of_the_noise_scale_rule(ratio, scale, base_batch) -> None:
    found, same = (build_rule(name)(ratio, noise_scale=scale, base_batch=base_batch) for name in SAME)
    assert found == same


def surge_from_the_peak(batch: int, *, peak: int = 64, floor: float | None = None) -> float:
    return build_rule("surge", peak_batch=peak, floor=floor)(batch / peak, noise_scale=None, base_batch=peak)


@pytest.mark.parametrize(
    ("batch", "floor", "expected"),
    [
        (64, None, 1.0),
        (256, None, 0.8),
        (16, None, 0.8),
        (4, None, 8 / 17),  # below the peak there is no floor
        (1024, None, 0.5),  # 8 / 17 without one
        (1024, 0.1, 8 / 17),
        (10**9, None, 0.5),
        (10**9, 1.0, 1.0),
    ],
)
def test_surge_against_its_peak(batch, floor, expected) -> None:
    assert surge_from_the_peak(batch, floor=floor) == pytest.approx(expected, rel=1e-15)


def test_surge_is_the_ratio_of_the_formula_at_two_batches() -> None:
    def formula(batch: float) -> float:
        return 1 / ((500 / batch) ** 0.5 + (batch / 500) ** 0.5)

    rule = build_rule("surge", peak_batch=500)
    for batch in (33, 100, 499, 501, 2000, 6900):  # the floor begins at 13.9 peaks
        found = rule(batch / 32, noise_scale=7.0, base_batch=32)
        assert found == pytest.approx(formula(batch) / formula(32), rel=1e-14)


def test_surge_below_its_peak_is_the_square_root_rule() -> None:
    rule = build_rule("surge", peak_batch=10**9)
    assert rule(16.0, noise_scale=None, base_batch=32) == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("surge", {}, "peak_batch is missing"),
        ("surge", {"peak_batch": 0}, "at least 1 sample"),
        ("surge", {"peak_batch": 64, "floor": 0.0}, "more than 0"),
        ("surge", {"peak_batch": 64, "floor": 1.1}, "at most 1"),
        ("surge", {"peak_batch": 64, "exponent": 0.5}, "does not apply to surge: remove it, or name power or"),
        ("sqrt", {"peak_batch": 64}, "does not apply to sqrt: remove it, or name surge"),
        ("auto", {"floor": 0.5}, "does not apply to auto"),
        ("adascale", {"exponent": 0.5}, "name power or noise_scale"),
        (f"{__name__}:own_rule", {"exponent": 0.5, "floor": 0.5}, "floor 0.5 does not apply"),
    ],
)
def test_settings_of_other_rules_are_refused(name, settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        build_rule(name, optimizer_name="sgd", **settings)


def test_an_unknown_noise_scale_risks_no_larger_rate() -> None:
    assert build_rule("noise_scale")(8.0, noise_scale=None, base_batch=32) == 1.0


@pytest.mark.parametrize(
    ("optimizer", "same_as"),
    [
        ("sgd", "noise_scale"),
        ("lars", "noise_scale"),
        ("clars", "noise_scale"),
        ("vr_sgd", "noise_scale"),
        ("vr_adam", "sqrt"),
        ("vr_lamb", "sqrt"),
        ("adam", "sqrt"),
        ("adamw", "sqrt"),
        ("lamb", "sqrt"),
        ("lans", "sqrt"),
    ],
)
def test_auto_follows_the_optimizers_family(optimizer, same_as) -> None:
    found = build_rule("auto", optimizer_name=optimizer)(4.0, noise_scale=100.0, base_batch=32)
    assert found == build_rule(same_as)(4.0, noise_scale=100.0, base_batch=32)


@pytest.mark.parametrize("optimizer", [None, "lion", "torch.optim:SGD"])
def test_auto_refuses_a_family_it_does_not_know_and_names_the_choices(optimizer) -> None:
    with pytest.raises(ValueError, match="constant, linear, sqrt, power, noise_scale"):
        build_rule("auto", optimizer_name=optimizer)


@pytest.mark.parametrize(
    ("name", "exponent", "said"),
    [
        ("power", None, "exponent is missing"),
        ("power", 1.5, "between 0 and 1"),
        ("noise_scale", -0.1, "between 0 and 1"),
        ("linear", 0.5, "does not apply to linear"),
        ("auto", 0.5, "does not apply to auto"),
        ("sqr", None, "did you mean sqrt"),
    ],
)
def test_what_makes_no_rule_is_refused_by_name(name, exponent, said) -> None:
    with pytest.raises(ValueError, match=said):
        build_rule(name, exponent=exponent, optimizer_name="sgd")


@pytest.mark.parametrize("name", ["constant", "linear", "sqrt", "noise_scale"])
@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(name, ratio) -> None:
    with pytest.raises(ValueError, match="positive number"):
        build_rule(name)(ratio, noise_scale=10.0, base_batch=8)


def wrong_at_one(exponent):
    return lambda ratio, *, noise_scale, base_batch: 2.0 * ratio


def own_rule(exponent):
    return lambda ratio, *, noise_scale, base_batch: ratio**exponent


def test_an_imported_rule_is_built_with_the_exponent() -> None:
    assert build_rule(f"{__name__}:own_rule", exponent=0.25)(16.0, noise_scale=None, base_batch=1) == 2.0


def test_an_imported_rule_must_be_one_at_ratio_one() -> None:
    with pytest.raises(ValueError, match="1 at ratio 1; got 2"):
        build_rule(f"{__name__}:wrong_at_one")
