"""The per-example meter on whole models, and in all the ways a forward and backward pass can be run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from orchestrator.errors import MeasureError
from orchestrator.measure.coverage import Layer, cover
from orchestrator.measure.norms import widened
from orchestrator.measure.per_example import PerExampleMeter
from orchestrator.measure.taps import Taps
from orchestrator.tasks.digits import convnet
from orchestrator.tasks.gpt import GPT, GPTShape
from tests.unit.examples import one_by_one, read

SHAPE = GPTShape(vocabulary=11, context=8, width=16, depth=2, heads=2, dropout=0.0)


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def scores(model: nn.Module, inputs: Tensor) -> Tensor:
    labels = inputs.flatten(1).sum(1).abs().long() % 3
    return functional.cross_entropy(widened(model(inputs)), labels)


def gpt(*, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    if tied:
        model.scores.weight = model.tokens.weight
    return model.double()


def small_convnet() -> nn.Module:
    torch.manual_seed(0)
    return convnet(8).double()


def text(samples: int = 6) -> Tensor:
    return torch.randint(SHAPE.vocabulary, (samples, SHAPE.context + 1), generator=torch.Generator().manual_seed(1))


def images(samples: int = 6) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[nn.Module, Tensor], Tensor]]] = {
    "transformer": (gpt, text(), next_token),
    "transformer with a tied head": (lambda: gpt(tied=True), text(), next_token),
    "convnet": (small_convnet, images(), scores),
}


@pytest.mark.parametrize("amp_scale", [1.0, 1024.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_over_the_samples_is_that_of_one_backward_pass_each(name: str, amp_scale: float) -> None:
    build, inputs, loss = MODELS[name]
    model = build()
    truth, whole = one_by_one(model, inputs, loss), torch.autograd.grad(loss(model, inputs), [*model.parameters()])
    mean_sq = sum(float(g.square().sum()) for g in whole)
    meter = PerExampleMeter(model, model.parameters())
    for sizes in ([6], [4, 2], [1, 3, 2]):
        found = read(meter, model, inputs.split(sizes), loss, amp_scale=amp_scale)
        assert found.weighted_sq_sum == pytest.approx(truth, rel=1e-9)
        assert found.mean_grad_sq == pytest.approx(mean_sq, rel=1e-9)
        assert found.left_out_grad_sq == 0


@pytest.mark.parametrize("name", MODELS)
def test_float32_agrees_with_float64_to_1e_5(name: str) -> None:
    build, inputs, loss = MODELS[name]
    truth = one_by_one(build(), inputs, loss)
    model = build().float()
    given = inputs.float() if inputs.is_floating_point() else inputs
    meter = PerExampleMeter(model, model.parameters())
    for _ in range(2):
        assert read(meter, model, [given], loss).weighted_sq_sum == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_with_a_loss_scale_agrees_to_the_precision_of_its_activations(
    name: str, dtype: torch.dtype, rel: float
) -> None:
    build, inputs, plain = MODELS[name]
    truth = one_by_one(build(), inputs, plain)
    model = build().float()
    given = inputs.float() if inputs.is_floating_point() else inputs

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return plain(model, batch)

    meter = PerExampleMeter(model, model.parameters())
    for _ in range(2):
        found = read(meter, model, [given], loss, amp_scale=256.0)
        assert found.weighted_sq_sum == pytest.approx(truth, rel=rel)


@pytest.mark.parametrize("past", [False, True])
def test_an_overflow_under_a_loss_scale_is_neither_taken_for_an_incomplete_gradient_nor_for_a_whole_one(
    past: bool,
) -> None:
    free = Free(past=past)
    model, inputs = nn.Sequential(free), torch.randn(4, 5)
    meter = PerExampleMeter(model, [free.inner.weight])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return scores(model, batch)

    assert not read(meter, model, [inputs], loss, amp_scale=1e9).grad_is_finite
    if past:
        with pytest.raises(MeasureError, match="do not account"):
            read(meter, model, [inputs], loss)
    else:
        assert read(meter, model, [inputs], loss).grad_is_finite


def test_dropout_draws_what_it_draws_without_measuring_and_belongs_to_the_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    inputs = torch.randn(4, 5).double()
    meter = PerExampleMeter(model, model.parameters())
    torch.manual_seed(7)
    found = read(meter, model, [inputs], scores, keep=True)
    gradients = [p.grad for p in model.parameters()]
    torch.manual_seed(7)
    mask = functional.dropout(torch.ones(4, 8).double(), 0.5)
    after = torch.rand(())
    model.zero_grad()

    def masked(model: nn.Module, batch: Tensor) -> Tensor:
        rows = [int((inputs == row).all(1).nonzero()) for row in batch]
        return scores(nn.Sequential(model[0], Times(mask[rows]), model[2]), batch)  # type: ignore[index]

    assert found.weighted_sq_sum == pytest.approx(one_by_one(model, inputs, masked), rel=1e-9)
    torch.manual_seed(7)
    scores(model, inputs).backward()
    assert torch.equal(torch.rand(()), after)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


class Times(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        # Only the values and not the inputs are wanted: ``scores`` takes its labels from what it is given.
        return x * self.factor


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass; the second block is called twice."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.LayerNorm(6)) for _ in "ab"
        )
        self.last = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for block in (self.blocks[0], self.blocks[1], self.blocks[1]):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "saved tensors", "reentrant"])
def test_gradient_checkpointing_reads_the_same(reentrant: bool | None) -> None:
    inputs = torch.randn(5, 5).double()
    truth = one_by_one(Checkpointed(reentrant=None).double(), inputs, scores)
    model = Checkpointed(reentrant=reentrant).double()
    meter = PerExampleMeter(model, model.parameters())
    for parts in ([inputs], [inputs], inputs.split(2)):
        assert read(meter, model, parts, scores).weighted_sq_sum == pytest.approx(truth, rel=1e-9)


def test_checkpointed_inputs_are_not_kept_until_the_backward_pass() -> None:
    model = Checkpointed(reentrant=False)
    meter = PerExampleMeter(model, model.parameters())
    inputs, saved = torch.randn(5, 5), []
    meter.begin_step(measure=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(inputs)
    measured = len(saved)
    meter.close()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(inputs)
    # The two layers outside the checkpoints keep their inputs once more; those inside are not seen to keep any.
    assert measured - len(saved) == 2


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_a_layer_that_is_computed_again_is_not_counted_again(reentrant: bool) -> None:
    # Counted twice, its factors would be held to the end of the micro-batch, for cross terms that there are not.
    model = Checkpointed(reentrant=reentrant)
    uses: dict[str, int] = {}

    def see(layer: Layer, inputs: Tensor, deltas: Tensor) -> None:
        uses[layer.path] = max(taps.calls[id(p)] for p in layer.parameters.values())

    taps = Taps(cover(model, model.parameters()).layers, see)
    taps.attach()
    scores(model, torch.randn(4, 5)).backward()
    taps.detach()
    assert uses == {"first": 1, "blocks.0.0": 1, "blocks.0.2": 1, "blocks.1.0": 2, "blocks.1.2": 2, "last": 1}


def test_parameters_and_whole_layers_that_a_pass_does_not_use_count_as_zero() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model, inputs = Half().double(), torch.randn(4, 5).double()
    meter = PerExampleMeter(model, model.parameters())
    truth = one_by_one(model, inputs, scores)
    for _ in range(2):
        assert read(meter, model, [inputs], scores).weighted_sq_sum == pytest.approx(truth, rel=1e-9)


def test_hooks_are_there_while_a_step_is_measured_and_gone_after() -> None:
    model = gpt()
    meter = PerExampleMeter(model, model.parameters())

    def hooks() -> int:
        return sum(len(m._forward_hooks) for m in model.modules()) + sum(
            len(p._backward_hooks or ()) for p in model.parameters()
        )

    for _ in range(2):
        meter.begin_step(measure=True)
        assert hooks() > 0
        meter.begin_step(measure=False)
        assert hooks() == 0


class Free(nn.Module):
    """A parameter of its own, and a linear layer that is used past its module on request."""

    def __init__(self, *, past: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.ones(5))
        self.past = past

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        return functional.linear(x, self.inner.weight) if self.past else self.inner(x)


def test_modules_without_a_rule_are_listed_in_one_refusal() -> None:
    model = nn.ModuleDict({"a": Free(), "b": nn.Bilinear(2, 2, 2), "c": nn.ConvTranspose1d(2, 2, 2)})
    with pytest.raises(MeasureError, match=r"(?s)a: .*shift.*b: .*weight, bias.*c: .*leave_out: \[a, b, c\]"):
        PerExampleMeter(model, model.parameters())


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(4, 2, sparse=True), "sparse=False"),
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
        (Own(2, 2), "differs from Linear"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "original0"),
        (nn.BatchNorm1d(4), "BatchNorm in training mode"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), "leave_out does not help"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(module: nn.Module, why: str) -> None:
    with pytest.raises(MeasureError, match=why):
        PerExampleMeter(module, module.parameters(), leave_out=())


def test_batch_norm_is_refused_though_left_out_and_taken_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(MeasureError, match="BatchNorm in training mode at 1"):
        PerExampleMeter(model, model.parameters(), leave_out=["1"])
    model[1].eval()
    inputs = torch.randn(4, 5).double()
    meter = PerExampleMeter(model, model.parameters(), leave_out=["1"])
    truth = one_by_one(model, inputs, scores, of=model[0].parameters())
    assert read(meter, model, [inputs], scores).weighted_sq_sum == pytest.approx(truth, rel=1e-9)
    model.train()
    with pytest.raises(MeasureError, match="BatchNorm in training mode at 1"):
        meter.begin_step(measure=True)


def test_what_is_left_out_is_in_neither_moment_and_still_seen_to_be_finite() -> None:
    model = nn.Sequential(Free(), nn.Linear(3, 3)).double()
    inputs = torch.randn(4, 5).double()
    with pytest.raises(MeasureError, match=r"no module .O\.inner.; did you mean 0\.inner"):
        PerExampleMeter(model, model.parameters(), leave_out=["O.inner"])
    meter = PerExampleMeter(model, model.parameters(), leave_out=["0"])
    measured = list(model[1].parameters())
    for _ in range(2):
        found = read(meter, model, [inputs], scores, keep=True)
        truth = one_by_one(model, inputs, scores, of=measured)
        squares = {p: float(p.grad.square().sum()) for p in model.parameters()}
        assert found.weighted_sq_sum == pytest.approx(truth, rel=1e-9)
        assert found.mean_grad_sq == pytest.approx(sum(squares[p] for p in measured), rel=1e-9)
        assert found.left_out_grad_sq == pytest.approx(sum(squares.values()) - found.mean_grad_sq, rel=1e-9)
        model.zero_grad()
    model[0].shift.grad = torch.full((5,), torch.nan).double()
    meter.begin_step(measure=False)
    assert not meter.read().grad_is_finite
    assert not meter.is_finite()
    with pytest.raises(MeasureError, match="leaves nothing"):
        PerExampleMeter(model, model.parameters(), leave_out=["0", "1"])


def test_a_parameter_that_no_module_holds_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(MeasureError, match="1 of the optimizer's parameters"):
        PerExampleMeter(model, [*model.parameters(), nn.Parameter(torch.ones(2))])


def test_a_weight_that_is_used_past_its_module_is_found_out() -> None:
    model, inputs = Free(past=True), torch.randn(4, 5)
    meter = PerExampleMeter(nn.Sequential(model), [model.inner.weight])
    with pytest.raises(MeasureError, match=r"0\.inner\.weight \(100 %\)"):
        read(meter, model, [inputs], scores)


def test_a_layer_whose_first_dimension_is_not_that_of_the_samples_is_refused() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).mean(0)

    model = SequenceFirst()
    meter = PerExampleMeter(model, model.parameters())
    with pytest.raises(MeasureError, match=r"inner .*first dimension is 7, in a micro-batch of 4"):
        read(meter, model, [torch.randn(4, 7, 5)], scores)


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(3, 3), (3,)), (nn.Conv1d(3, 3, 1), (3, 4)), (nn.Conv2d(3, 3, 1), (3, 4, 4)), (nn.LayerNorm(3), (3,))],
)
def test_a_layer_that_is_called_without_samples_is_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"all": nn.Linear(3, 3), "one": module})
    meter = PerExampleMeter(model, model.parameters())
    with pytest.raises(MeasureError, match=r"one \(.*without a dimension for the samples: .*leave_out: \[one\]"):
        read(meter, model, [torch.randn(4, 3)], lambda m, x: m["all"](x).sum() + m["one"](torch.ones(shape)).sum())  # type: ignore[index]


def test_inputs_may_be_given_by_name() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.RMSNorm(3)}).double()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model["b"](x=model["a"](input=batch)).tanh().sum(1).mean()  # type: ignore[index]

    inputs = torch.randn(4, 5).double()
    found = read(PerExampleMeter(model, model.parameters()), model, [inputs], loss)
    assert found.weighted_sq_sum == pytest.approx(one_by_one(model, inputs, loss), rel=1e-9)


def test_a_models_own_parameters_are_left_out_by_the_empty_path() -> None:
    model, inputs = Free().double(), torch.randn(4, 5).double()
    with pytest.raises(MeasureError, match=r'the model itself: .*shift(?s:.*)leave_out: \[""\]'):
        PerExampleMeter(model, model.parameters())
    meter = PerExampleMeter(model, model.parameters(), leave_out=[""])
    truth = one_by_one(model, inputs, scores, of=model.inner.parameters())
    assert read(meter, model, [inputs], scores).weighted_sq_sum == pytest.approx(truth, rel=1e-9)


def test_leaving_out_one_of_two_modules_that_share_a_parameter_is_found_out() -> None:
    model = gpt(tied=True)
    meter = PerExampleMeter(model, model.parameters(), leave_out=["scores"])
    with pytest.raises(MeasureError, match="all modules that hold it"):
        read(meter, model, [text()], next_token)


def test_a_second_pass_through_the_same_graph_is_refused() -> None:
    def penalised(model: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.requires_grad_()
        loss = scores(model, batch)
        (slope,) = torch.autograd.grad(loss, batch, create_graph=True)
        return loss + slope.square().mean()

    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    meter = PerExampleMeter(model, model.parameters())
    with pytest.raises(MeasureError, match="a second backward pass through 0"):
        read(meter, model, [torch.randn(4, 5)], penalised)


@pytest.mark.parametrize("how", ["wrapped", "in place", "inside"])
def test_compiled_modules_are_refused(how: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    if how == "wrapped":
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    elif how == "in place":
        model[0].compile(backend="aot_eager")  # type: ignore[index]
    else:
        model = nn.Sequential(torch.compile(model, backend="aot_eager"), nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match=r"torch\.compile at"):
        PerExampleMeter(model, model.parameters())


def test_a_compiled_loss_is_found_out() -> None:
    model, inputs = nn.Sequential(nn.Linear(5, 3), nn.Tanh()), torch.randn(4, 5)
    meter = PerExampleMeter(model, model.parameters())
    compiled = torch.compile(scores, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler
        compiled(model, inputs)  # compiled before it is measured, as at measure.every_steps > 1
        with pytest.raises(MeasureError, match="do not account"):
            read(meter, model, [inputs], compiled)


@pytest.mark.parametrize("counts", [[4, 4, 4, 4], [2, 4, 6, 4]])
def test_a_mean_over_tokens_of_unequal_lengths_adds_the_variance_of_the_lengths(counts: Sequence[int]) -> None:
    # Equal tokens: each sample's mean gradient is G exactly, so that all that is left of tr(Sigma)/|G|^2 is CV^2.
    model = nn.Linear(3, 1, bias=False).double()
    lengths = torch.tensor(counts)
    inputs = torch.ones(4, 6, 3).double()
    used = torch.arange(6) < lengths.unsqueeze(1)

    def token_mean(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).squeeze(2)[used].mean()

    found = read(PerExampleMeter(model, model.parameters()), model, [inputs], token_mean)
    trace_cov = (found.weighted_sq_sum - 4 * found.mean_grad_sq) / 3
    variation = float(lengths.double().var()) / float(lengths.double().mean()) ** 2
    assert trace_cov / found.mean_grad_sq == pytest.approx(variation, abs=1e-12)
