"""Do drawn fields beat single ones, by CRPS and by spectrum?

Kolmogorov flow on 64 × 64 points (viscosity 0.005, force at mode 4), simulated here.

Downscaling: every second point of the vorticity (32 × 32) is to be told from its means over
4 × 4 of these (8 × 8). A denoiser draws fine fields; beside it bilinear interpolation
between the coarse means, and a U-Net of the same layers that is trained on the mean
absolute error, which is the CRPS of a single field, and kept where that was least on
validation flows.

Emulator: means over 4 × 4 of the 64 × 64 points, 0.4 apart in time; what happens below that
grid is not known, so that the next state is not determined. The same denoiser, given the
present state, is rolled out; beside it persistence, and the U-Net trained on the mean
absolute error of a step.

CRPS is the fair one; of a single field it is the mean absolute error. Spectra are those of
shells of wavenumbers, means over fields, as shares of the truth's; ± is the standard
deviation over bootstrap samples of test flows.

Each part is kept in `results/downscaling_<hardware>.json`, so that they may run one by one.

Run: taskset -c 0 python -m benchmarks.downscaling [--updates 2500] [--only downscaling]
"""

import argparse
import json
import os
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from benchmarks._harness import RESULTS, hardware, report, table

C, G = tx.configuration, tx.generation
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 160, 8, 24
NUM_MEMBERS, NUM_LEADS = 8, 10
SPENT = "training, processor s (s)"
# Wider than by default: scales of a field differ in deviation by a factor of ten.
DENOISING = C.Denoising(log_sigma_std=1.5)
DOWNSCALING = G.EDMSampler(32, sigma_min=0.003, sigma_max=40.0)
# Karras et al. 2022, section 4: denoisers take away a little more than the noise, against
# which some more is added; how much is to be tried (1.003 to 1.007 in their table 5).
CHURN_NOISES = (1.0, 1.01, 1.02, 1.03, 1.04, 1.05)
EMULATION = G.EDMSampler(12, sigma_min=0.003, sigma_max=20.0)


def simulate(key):
    """Vorticity `(flows, 21, 1, 64, 64)`, 0.4 apart, divided by its deviation."""
    flow = tx.sample_data.kolmogorov_flow_2d(
        64, NUM_TRAIN + NUM_VALIDATION + NUM_TEST, dt=0.4, num_substeps=20,
        diffusivity=0.005, temporal_horizon=21, num_warmup_steps=30, key=key,
    )  # fmt: skip
    return flow / jnp.std(flow)


def in_parts(flow):
    """Flows for training, validation and test."""
    return jnp.split(flow, (NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION))


def downscaling_fields(flow, every):
    """Fine fields, and what is known of them: coarse means, and where the force is."""
    fine = flow[:, ::every, :, ::2, ::2]
    fine = fine.reshape(-1, *fine.shape[2:])
    y = 2 * jnp.pi * jnp.arange(32) / 32
    force = jnp.stack([jnp.cos(4 * y), jnp.sin(4 * y)])[:, None]
    static = jnp.broadcast_to(force, (len(fine), 2, 32, 32))
    return G.Fields(fine, (jax.vmap(lambda u: G.coarsen(u, 4))(fine), static))


def network(in_channels, key):
    make = lambda key: G.UNet(in_channels, 1, hidden_channels=16, key=key)  # noqa: E731
    return eqx.filter_jit(make)(key)


def count(model):
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return sum(x.size for x in leaves)


def train(model, configuration, data, held_out, updates, key, *, best=False):
    """The trained model, and how long it took: seconds, and processor seconds.

    Args:
        best: The weights that were best on validation data, and an end where these do not
            improve any more; else the average of the last ones.
    """
    trainer = tx.trainer.Trainer(
        data,
        configuration,
        optimizer=optax.adam(optax.cosine_decay_schedule(2e-3, updates)),
        num_training_steps=updates,
        batch_size=16,
        max_grad_norm=1.0,
        ema_decay=0.995,
        callbacks=[
            tx.callback.Validation(
                configuration, held_out, every=max(1, updates // 15), batch_size=44
            )
        ],
        early_stopping=tx.evaluation.EarlyStopping(
            "validation", patience=4 if best else 100
        ),
        progress=False,
    )
    began = time.perf_counter(), time.process_time()
    found, history = trainer(model, key=key)
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    print(type(model).__name__, seconds, history.best, flush=True)
    return (found if best else history.state.ema_model), seconds


def mapped(f, *args, batch_size):
    """`f` over leading axes, a few at a time, with convolutions fast inside of loops."""
    whole = lambda *args: jax.lax.map(  # noqa: E731
        lambda row: f(*row), args, batch_size=batch_size
    )
    return jax.block_until_ready(jax.jit(tx.engine.fast_convolutions(whole))(*args))


def spectrum(fields):
    """Spectra `(rows, wavenumbers)`, means over members if there are."""
    power = jax.vmap(tx.metrics.energy_spectrum)
    found = power(fields.reshape(-1, *fields.shape[-3:]))
    return np.asarray(found.reshape(len(fields), -1, found.shape[-1]).mean(axis=1))


def shares(fields, truth, num_flows, wavenumber):
    """Share of the truth's power at a wavenumber, and its deviation over flows."""
    rows = [spectrum(x)[:, wavenumber] for x in (fields, truth)]
    rows = [x.reshape(num_flows, -1).mean(axis=1) for x in rows]
    picks = np.random.default_rng(0).integers(0, num_flows, (2000, num_flows))
    spread = np.std(rows[0][picks].mean(axis=1) / rows[1][picks].mean(axis=1))
    return rows[0].mean() / rows[1].mean(), spread


def crps(ensemble, truth):
    return float(jnp.mean(jax.vmap(tx.loss.crps_ensemble)(ensemble, truth)))


def churned(noise):
    return G.EDMSampler(
        32, sigma_min=0.003, sigma_max=40.0, churn=20.0, churn_range=(0.01, 50.0),
        churn_noise=noise,
    )  # fmt: skip


def best_churned(denoiser, data, key):
    """The noise whose draws have the truth's power at the finest scales, from k = 8 on.

    Also a table of what was tried.
    """
    keys = jax.random.split(key, len(data.target))
    truth = spectrum(data.target).mean(axis=0)
    rows, misses = [], []
    for noise in CHURN_NOISES:
        draws = mapped(
            lambda key, c, noise=noise: G.generate(
                denoiser, churned(noise), key, c, num_samples=2
            ),
            keys, data.condition, batch_size=8,
        )  # fmt: skip
        share = (spectrum(draws).mean(axis=0) / truth)[8:]
        misses.append(np.mean(np.abs(np.log(share))))
        rows.append(
            [
                noise,
                f"{crps(draws, data.target):.4f}",
                *(f"{x:.3f}" for x in share[::4]),
            ]
        )
        print(rows[-1], flush=True)
    header = ["churn_noise", "CRPS", "k = 8", "k = 12", "k = 16", "k = 20"]
    return CHURN_NOISES[int(np.argmin(misses))], table(header, rows)


def downscale(parts, updates):
    """The part on downscaling, as Markdown."""
    data, held_out = (
        downscaling_fields(p, n) for p, n in zip(parts, (1, 2), strict=False)
    )
    test = downscaling_fields(parts[2], 6)
    items = tx.data.Samples(data), tx.data.Samples(held_out)
    scales = G.FieldScales(1, 3, residual=True).fitted(data)
    keys = jax.random.split(jax.random.key(1), 6)
    denoiser = G.Denoiser(network(4, keys[0]), scales)
    unet = G.Regression(network(3, keys[1]), scales)
    sizes = count(denoiser), count(unet)
    denoiser, cost = train(denoiser, DENOISING, *items, updates, keys[2])
    unet, unet_cost = train(
        unet, C.FieldRegression(tx.loss.mae), *items, updates, keys[3], best=True
    )
    draw_keys = jax.random.split(keys[4], len(test.target))

    def drawn(sampler):
        return mapped(
            lambda key, c: G.generate(
                denoiser, sampler, key, c, num_samples=NUM_MEMBERS
            ),
            draw_keys, test.condition, batch_size=4,
        )  # fmt: skip

    noise, tried = best_churned(denoiser, held_out, keys[5])
    began = time.process_time()
    draws = drawn(DOWNSCALING)
    per_draw = (time.process_time() - began) / draws.shape[0] / NUM_MEMBERS
    fields = {
        "bilinear": jax.vmap(lambda c: G.upsample(c[0], (32, 32)))(test.condition),
        "U-Net, one field": mapped(unet, test.condition, batch_size=12),
        "denoiser, one draw": draws[:, 0],
        f"denoiser, {NUM_MEMBERS} draws": draws,
        f"denoiser, {NUM_MEMBERS} draws, churned": drawn(churned(noise)),
    }
    times = {"U-Net, one field": unet_cost, f"denoiser, {NUM_MEMBERS} draws": cost}
    numbers = {"U-Net, one field": sizes[1], f"denoiser, {NUM_MEMBERS} draws": sizes[0]}
    rows, spectra = [], []
    for name, found in fields.items():
        ensemble = found if found.ndim == 5 else found[:, None]
        error = jnp.sqrt(jnp.mean((ensemble.mean(axis=1) - test.target) ** 2))
        wall, processor = times.get(name, (None, None))
        rows.append(
            [name, numbers.get(name, "–"), f"{crps(ensemble, test.target):.4f}",
             f"{error:.4f}", "–" if wall is None else f"{processor:.0f} ({wall:.0f})"]
        )  # fmt: skip
        found_shares = [
            shares(found, test.target, NUM_TEST, k) for k in (2, 4, 8, 12, 16)
        ]
        spectra.append([name, *(f"{a:.3f} ± {b:.3f}" for a, b in found_shares)])
        print(rows[-1], spectra[-1], flush=True)
    ratios = [
        f"{float(tx.metrics.spread_error_ratio(found, test.target)):.3f}"
        for found in list(fields.values())[-2:]
    ]
    note = (
        f"At most {updates} updates of 16 for either network. "
        f"{len(data.target)} fields for training, {len(test.target)} of {NUM_TEST} other "
        f"flows for testing. Spread over error of the draws: {ratios[0]}, churned "
        f"{ratios[1]} (1 if calibrated). A draw takes {per_draw:.2f} processor seconds, "
        "compilation included."
    )
    body = f"## Downscaling, 8 × 8 to 32 × 32\n\n{note}\n\n"
    body += table(["", "weights", "CRPS", "RMSE of the mean", SPENT], rows)
    body += (
        "\n\nShare of the truth's power at a wavenumber (16 is the grid's finest):\n\n"
    )
    body += table(["", *(f"k = {k}" for k in (2, 4, 8, 12, 16))], spectra)
    return body + (
        f"\n\nChurned with a noise of {noise}, which came nearest to the truth's power "
        f"from k = 8 on ({NUM_VALIDATION} flows for validation, 2 draws each; past k = 16 "
        f"there are the corners of the grid alone):\n\n{tried}"
    )


def emulate(parts, updates):
    """The part on the emulator, as Markdown."""
    coarse = [jax.vmap(jax.vmap(lambda u: G.coarsen(u, 4)))(p) for p in parts]
    y = lambda p, i: p[:, i : len(p[0]) - 1 + i].reshape(-1, 1, 16, 16)  # noqa: E731
    pairs = G.Fields(y(coarse[0], 1), y(coarse[0], 0))
    scales = G.FieldScales(1, 1, residual=True).fitted(pairs)
    keys = jax.random.split(jax.random.key(2), 5)
    denoiser = G.Denoiser(network(2, keys[0]), scales)
    unet = G.Regression(network(1, keys[1]), scales)
    denoiser, cost = train(
        denoiser, C.Denoising(next_step=True), *coarse[:2], updates, keys[2]
    )
    unet, unet_cost = train(
        unet, C.FieldRegression(tx.loss.mae, next_step=True), *coarse[:2], updates,
        keys[3], best=True,
    )  # fmt: skip
    first, truth = coarse[2][:, 0], coarse[2][:, 1 : NUM_LEADS + 1]
    stepper = tx.Stepper(G.Generator(denoiser, EMULATION), stochastic=True)

    def members(key, u):
        keys = jax.random.split(key, NUM_MEMBERS)
        return jax.vmap(lambda k: tx.rollout(stepper, u, NUM_LEADS, key=k))(keys)

    draws = mapped(members, jax.random.split(keys[4], NUM_TEST), first, batch_size=4)
    single = mapped(
        lambda u: tx.rollout(unet, u, NUM_LEADS), first, batch_size=NUM_TEST
    )
    still = jnp.broadcast_to(first[:, None], truth.shape)
    rows, spectra = [], []
    leads = (1, 2, 5, NUM_LEADS)
    for name, found, spent in (
        ("persistence", still[:, None], None),
        ("U-Net, one state", single[:, None], unet_cost),
        (f"denoiser, {NUM_MEMBERS} rollouts", draws, cost),
    ):
        scores = [crps(found[:, :, t - 1], truth[:, t - 1]) for t in leads]
        time_spent = "–" if spent is None else f"{spent[1]:.0f} ({spent[0]:.0f})"
        rows.append([name, *(f"{x:.4f}" for x in scores), time_spent])
        at_end = [
            shares(found[:, :, -1], truth[:, -1], NUM_TEST, k) for k in (2, 4, 6, 8)
        ]
        spectra.append([name, *(f"{a:.3f} ± {b:.3f}" for a, b in at_end)])
        print(rows[-1], spectra[-1], flush=True)
    ratios = [
        float(tx.metrics.spread_error_ratio(draws[:, :, t - 1], truth[:, t - 1]))
        for t in leads
    ]
    note = (
        f"At most {updates} updates of 16 for either network. "
        f"{len(pairs.target)} steps of {NUM_TRAIN} flows for training, {NUM_TEST} rollouts "
        "of other flows. Spread over error of the members at these leads: "
        + ", ".join(f"{r:.3f}" for r in ratios)
        + "."
    )
    body = f"## Emulator of the next state, 16 × 16\n\n{note}\n\nCRPS by lead:\n\n"
    body += table(["", *(f"{t} steps" for t in leads), SPENT], rows)
    body += f"\n\nShare of the truth's power after {NUM_LEADS} steps:\n\n"
    return body + table(["", *(f"k = {k}" for k in (2, 4, 6, 8))], spectra)


PARTS = {"downscaling": downscale, "emulator": emulate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=2500)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    arguments = parser.parse_args()
    updates = arguments.updates
    parts = in_parts(simulate(jax.random.key(0)))
    path = RESULTS / f"downscaling_{hardware()}.json"
    for name in arguments.only:
        found = PARTS[name](parts, updates)
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | {name: found}, indent=1) + "\n")
    kept = json.loads(path.read_text())
    body = "\n\n".join(kept[name] for name in PARTS if name in kept)
    report(
        "downscaling",
        "Downscaling and emulation by drawn fields",
        f"On {len(os.sched_getaffinity(0))} of the cores, which other work shared: "
        "processor seconds count.\n\n" + body,
    )


if __name__ == "__main__":
    main()
