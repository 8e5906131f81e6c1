"""Trains the same flow by sbi's or sbijax's own trainer, in an environment that has it.

Run by `benchmarks/amortized.py` with the Python of that environment: arrays come from and
results go to files. Nothing of this package is imported.

`python _amortized_peers.py sbi|sbijax <pairs.npz> <result.json> <epochs> [<target>]`: the
held-out negative log-likelihood after every epoch, and the seconds until then; with a
target (sbijax, which shows nothing on the way) the seconds of a run that ends where the
held-out value first reaches it.
"""

import importlib
import json
import sys
import time

import numpy as np

BATCH_SIZE, RATE, LAYERS, WIDTH = 200, 5e-4, 5, 50


def sbi(data, num_epochs, target):
    """`NPE.train`, called for one epoch after another; judging is not timed."""
    del target
    torch = importlib.import_module("torch")
    inference = importlib.import_module("sbi.inference")
    posterior_nn = importlib.import_module("sbi.neural_nets").posterior_nn
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arrays = {k: torch.as_tensor(v) for k, v in data.items()}
    dim = arrays["theta"].shape[1]
    prior = torch.distributions.MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    build = posterior_nn(
        "maf", hidden_features=WIDTH, num_transforms=LAYERS, num_blocks=2,
        z_score_theta="none", z_score_x="none",
    )  # fmt: skip
    trainer = inference.NPE(prior, density_estimator=build, show_progress_bars=False)
    trainer.append_simulations(arrays["theta"], arrays["x"])
    curve, total = [], 0.0
    for epoch in range(1, num_epochs + 1):
        began = time.perf_counter()
        model = trainer.train(
            training_batch_size=BATCH_SIZE, learning_rate=RATE, max_num_epochs=epoch,
            stop_after_epochs=10**6, resume_training=epoch > 1,
        )  # fmt: skip
        total += time.perf_counter() - began
        # `train` returns the best weights; the last ones go on.
        with torch.no_grad():
            losses = model.loss(arrays["held_theta"], condition=arrays["held_x"])
        curve.append((total, float(losses.mean())))
    size = sum(p.numel() for p in model.parameters())
    return {"curve": curve, "parameters": size}


def sbijax(data, num_epochs, target):
    """`NPE.fit` for so many epochs; the curve has one point."""
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    package = importlib.import_module("sbijax")
    make_maf = importlib.import_module("sbijax.nn").make_maf
    tfd = importlib.import_module("tensorflow_probability.substrates.jax").distributions

    dim = data["theta"].shape[1]
    prior = lambda: tfd.JointDistributionNamed(  # noqa: E731
        {"theta": tfd.Normal(np.zeros(dim, np.float32), 1.0)}
    )
    flow = make_maf(dim, n_layers=LAYERS, hidden_sizes=(WIDTH, WIDTH))
    pairs = {"y": data["x"], "theta": {"theta": data["theta"]}}

    def run(epochs):
        model = package.NPE((prior, None), flow, use_event_space_bijections=False)
        began = time.perf_counter()
        params, _ = model.fit(
            jax.random.key(0), pairs, optimizer=optax.adam(RATE), n_iter=epochs,
            batch_size=BATCH_SIZE, n_early_stopping_patience=10**6,
        )  # fmt: skip
        jax.block_until_ready(params)
        seconds = time.perf_counter() - began
        values = flow.apply(
            params, None, method="log_prob", y=data["held_theta"], x=data["held_x"]
        )
        return seconds, -float(np.mean(values)), params

    seconds, loss, params = run(num_epochs)
    result = {
        "curve": [(seconds, loss)],
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }
    if target is not None:
        low, high, best = 0, num_epochs, seconds
        while high - low > 1:
            middle = (low + high) // 2
            seconds, loss, _ = run(middle)
            low, high, best = (
                (low, middle, seconds) if loss <= target else (middle, high, best)
            )
        result |= {"seconds": best, "epochs": high}
    return result


def main() -> None:
    who, source, out, epochs, *rest = sys.argv[1:]
    data = dict(np.load(source))
    target = float(rest[0]) if rest else None
    result = {"sbi": sbi, "sbijax": sbijax}[who](data, int(epochs), target)
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
