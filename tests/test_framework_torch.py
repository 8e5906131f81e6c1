"""A run handed to Lightning follows the curve of the run itself."""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk import experiment
from trainax_pk.experiment import read_run, to_lightning
from trainax_pk.framework import optax_for_torch

# Several hundred MB: not everybody who runs these tests has them.
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies, at import
    lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}
TEXT = """
precision: {precision}
seed: 3
data: {{kind: lorenz_63, num_samples: 10, temporal_horizon: 20}}
model: {{kind: mlp, width: 8, depth: 2, activation: tanh}}
configuration: {{kind: supervised, num_rollout_steps: 2{configuration}}}
optimizer: {optimizer}
training: {{num_steps: {num_steps}, batch_size: 16, program: loop{training}}}
"""
COSINE = "{kind: cosine, peak: 1e-2, warmup: 5, minimum_ratio: 0.1}"


def make_run(
    optimizer="{kind: adam, learning_rate: 1e-2}",
    *,
    configuration="",
    training="",
    num_steps=50,
    precision="float64",
):
    text = TEXT.format(
        precision=precision,
        optimizer=optimizer,
        configuration=configuration,
        training=training,
        num_steps=num_steps,
    )
    return read_run(text)


def twin(model):
    """The torch network with the weights of an `eqx.nn.MLP`."""
    layers = []
    for layer in model.net.layers:
        out_size, in_size = layer.weight.shape
        dtype = getattr(torch, layer.weight.dtype.name)
        linear = torch.nn.Linear(in_size, out_size, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(np.array(layer.weight)))
            linear.bias.copy_(torch.from_numpy(np.array(layer.bias)))
        layers += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


class Curve(lightning.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(float(outputs["loss"]))


def curves(run, **options):
    """Losses of our trainer and of Lightning's, and the trained weights of both."""
    built = experiment.build(run)
    model, history = built.train()
    net, curve = twin(built.model), Curve()
    hand_off = to_lightning(run, net, **options)
    hand_off.fit(callbacks=[curve], limit_val_batches=0, **QUIET)
    assert hand_off.module.model is net and len(curve.losses) == hand_off.num_steps
    ours = [x for layer in model.net.layers for x in (layer.weight, layer.bias)]
    theirs = [p.detach().numpy() for p in net.parameters()]
    return np.asarray(history.loss), np.array(curve.losses), ours, theirs


EXACT = [
    "{kind: sgd, learning_rate: 1e-2, nesterov: true, clip_value: 20.0}",
    "{kind: sgd, learning_rate: 1e-4, momentum: 0.9}",
    "{kind: sgd, learning_rate: 1e-4, momentum: 0.9, nesterov: true}",
    f"{{kind: adam, learning_rate: {COSINE}, b1: 0.8, b2: 0.99, eps: 1e-3}}",
    "{kind: adamw, learning_rate: 1e-2, weight_decay: 0.1, clip_norm: 0.5}",
    f"{{kind: adamw, learning_rate: {COSINE}, weight_decay: 0.1, decayed: matrices}}",
]
OTHERS = [
    "{kind: nadam, learning_rate: 1e-2}",
    "{kind: radam, learning_rate: 1e-2, threshold: 6.0}",
    f"{{kind: rmsprop, learning_rate: {COSINE}, centered: true, momentum: 0.9}}",
    "{kind: adagrad, learning_rate: 1e-2, clip_norm: 0.5}",
    "{kind: lamb, learning_rate: 1e-2, weight_decay: 0.1, decayed: matrices}",
    "{kind: lion, learning_rate: 1e-3}",
    "{kind: muon, learning_rate: 1e-2}",
]


@pytest.mark.parametrize(
    ("optimizer", "chosen"),
    [
        *((o, "torch") for o in EXACT),
        *((o, "auto") for o in OTHERS),
        (EXACT[-1], "optax"),
    ],
)
def test_the_curve_is_that_of_the_run(optimizer, chosen):
    ours, theirs, weights, found = curves(make_run(optimizer), optimizer=chosen)
    assert ours[-1] < 0.95 * ours[0]
    np.testing.assert_allclose(theirs, ours, rtol=1e-10)
    for a, b in zip(found, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_the_curve_in_single_precision():
    with jax.enable_x64(False):
        for optimizer in (EXACT[0], EXACT[-1], OTHERS[0]):
            ours, theirs, *_ = curves(make_run(optimizer, precision="float32"))
            np.testing.assert_allclose(theirs, ours, rtol=1e-5)


@pytest.mark.parametrize(
    "configuration",
    [
        ", loss: mae",
        ", loss: rmse, time_level_weights: [0.5, 2.0]",
        ", loss: nmse, cut_bptt: true",
        ", loss: nmae, adjoint: checkpointed",
        ", loss: nrmse, cut_bptt: true, cut_bptt_every: 2",
    ],
)
def test_losses_and_cuts(configuration):
    run = make_run(configuration=configuration, num_steps=10)
    ours, theirs, *_ = curves(run)
    np.testing.assert_allclose(theirs, ours, rtol=1e-10)


def test_batches_are_those_of_the_trainer():
    run = make_run(training=", window_stride: 3", num_steps=21)
    built = experiment.build(run)
    hand_off = to_lightning(run, twin(built.model))
    order_key, _ = jax.random.split(built.key)
    windows = built.trainer.windows
    order = tx.data.ShuffledOrder(len(windows), 16, order_key)
    found = list(hand_off.train)
    assert len(found) == len(hand_off.train) == 21
    for i, batch in enumerate(found):
        expected = windows[order.indices(i, 1)[0]].state
        np.testing.assert_array_equal(batch.numpy(), expected)
    again = list(hand_off.train)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    validation = torch.cat(list(hand_off.validation))
    expected = tx.data.Windows(built.split.validation, 2)
    np.testing.assert_array_equal(
        validation.numpy(), expected[np.arange(len(expected))].state
    )


def test_validation_is_that_of_the_run():
    run = make_run(num_steps=5)
    built = experiment.build(run)
    hand_off = to_lightning(run, twin(built.model))
    (found,) = hand_off.trainer(**QUIET).validate(
        hand_off.module, hand_off.validation, verbose=False
    )
    validation = tx.callback.Validation(
        built.trainer.configuration, built.split.validation, every=1
    )
    state = tx.TrainState.create(built.model, built.trainer.optimizer, key=built.key)
    expected = validation(tx.callback.Context(0, state, lambda: None))
    np.testing.assert_allclose(found["validation"], expected, rtol=1e-10)


def test_validation_is_whole_after_lightnings_sanity_check():
    run = make_run(num_steps=5)
    built = experiment.build(run)
    net = twin(built.model)
    hand_off = to_lightning(run, net)
    options = {**QUIET, "num_sanity_val_steps": 2}
    trainer = hand_off.fit(**options)
    (expected,) = hand_off.trainer(**QUIET).validate(
        hand_off.module, to_lightning(run, net).validation, verbose=False
    )
    found = trainer.callback_metrics["validation"]
    np.testing.assert_allclose(found, expected["validation"], rtol=1e-12)
    # Who leaves early leaves nothing behind; who resumes goes on once.
    next(iter(hand_off.train))
    assert hand_off.train.state_dict() == {"next": 1}
    assert len(list(hand_off.train)) == 5
    hand_off.train.load_state_dict({"next": 2})
    assert [len(list(hand_off.train)) for _ in range(2)] == [3, 5]


@pytest.mark.parametrize("optimizer", [EXACT[3], OTHERS[2]])
def test_lightning_resumes_where_it_was(tmp_path, optimizer):
    run = make_run(optimizer, num_steps=20)
    model = experiment.build(run).model
    alone, whole = Curve(), to_lightning(run, twin(model))
    whole.fit(callbacks=[alone], limit_val_batches=0, **QUIET)
    saving = lightning.callbacks.ModelCheckpoint(
        tmp_path, filename="at_{step}", every_n_train_steps=8, save_top_k=-1
    )
    options = {**QUIET, "enable_checkpointing": True, "limit_val_batches": 0}
    to_lightning(run, twin(model)).fit(callbacks=[saving], **options)
    curve = Curve()
    second = to_lightning(run, twin(model))
    trainer = second.trainer(callbacks=[curve], limit_val_batches=0, **QUIET)
    trainer.fit(second.module, second.train, ckpt_path=tmp_path / "at_step=8.ckpt")
    np.testing.assert_array_equal(curve.losses, alone.losses[8:])


def test_an_optimizer_of_optax_on_torch_alone():
    net = torch.nn.Linear(3, 2)
    frozen = net.bias.detach().clone()
    lion = optax_for_torch([net.weight], optax.lion(1e-2))
    before = net.weight.detach().clone()
    net(torch.ones(4, 3)).sum().backward()
    assert float(lion.step(lambda: net.weight.sum().detach())) == pytest.approx(
        float(before.sum())
    )
    expected = optax.lion(1e-2)
    value = jnp.asarray(before.numpy())
    grads = jnp.full((2, 3), 4.0, jnp.float32)
    updates, _ = expected.update(grads, expected.init(value), value)
    np.testing.assert_allclose(net.weight.detach(), value + updates, rtol=1e-6)
    assert torch.equal(frozen, net.bias)


@pytest.mark.parametrize(
    ("run", "options", "match"),
    [
        ({"optimizer": OTHERS[0]}, {"optimizer": "torch"},
         r"\['sgd', 'adam', 'adamw'\], got 'nadam'.*optimizer='optax'"),
        ({"optimizer": "lbfgs"}, {}, "got `lbfgs`.*Choose another"),
        ({}, {"optimizer": "jax"}, "'auto', 'torch' or 'optax', got 'jax'"),
        ({"configuration": ", adjoint: {kind: k_step, k: 1}"}, {}, "cut_bptt_every"),
        ({"training": ", ema_decay: 0.9"}, {}, "training.ema_decay.*0.9"),
        ({"training": ", compute_dtype: bfloat16"}, {}, "bf16-mixed"),
    ],
)  # fmt: skip
def test_refusals(run, options, match):
    net = torch.nn.Linear(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"(?s){match}"):
        to_lightning(make_run(**run), net, **options)


def test_refusals_of_other_parts(tmp_path):
    net = torch.nn.Linear(3, 3, dtype=torch.float64)
    text = TEXT.format(
        precision="float64",
        optimizer="{kind: sgd, learning_rate: 0.1}", configuration="", training="",
        num_steps=2,
    )  # fmt: skip
    other = text.replace("kind: supervised", "kind: residuum")
    with pytest.raises(ValueError, match="configuration `supervised`.*`residuum`"):
        to_lightning(read_run(other), net)
    with pytest.raises(ValueError, match=r"EarlyStopping\('validation'\)"):
        to_lightning(read_run(text + "early_stopping: {}\ncallbacks: "
                              "[{kind: validation, every: 1}]\n"), net)  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"torch.nn.Module, got function.*tx\.framework"
    ):
        to_lightning(path, lambda u: u)
    with pytest.raises(ValueError, match=r"float64.*got \['float32'\].*torch\.float64"):
        to_lightning(path, torch.nn.Linear(3, 3))
    frozen = torch.nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)
    with pytest.raises(ValueError, match="got Linear, of which all are frozen"):
        to_lightning(path, frozen)
    hand_off = to_lightning(path, torch.nn.Linear(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\[16, 3\], got torch.float64\[16, 4\]"):
        hand_off.module.loss(next(iter(hand_off.train)))


@pytest.mark.parametrize(
    ("parameters", "transformation", "match"),
    [
        (lambda: [torch.zeros(2)], optax.adam, "optax transformation, got function"),
        (lambda: [], optax.sgd(0.1), "one group, got none"),
        (lambda: [{"params": [torch.zeros(2)]}], optax.sgd(0.1), "got several groups"),
        (lambda: [torch.zeros(2, dtype=torch.bfloat16)], optax.sgd(0.1), "got bfloat16"),
    ],
)  # fmt: skip
def test_refusals_of_the_optimizer(parameters, transformation, match):
    with pytest.raises(ValueError, match=match):
        optax_for_torch(parameters(), transformation)


def test_the_page_runs():
    page = Path(__file__).parent.parent / "docs" / "frameworks.md"
    blocks = re.findall(r"(?:^    .*\n|^\n)+", page.read_text(), re.MULTILINE)
    code = [b for b in blocks if "to_lightning" in b]
    assert len(code) == 1
    lines = [line[4:] for line in code[0].strip("\n").splitlines()]
    exec(compile("\n".join(lines), str(page), "exec"), {})
