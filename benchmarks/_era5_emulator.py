"""The emulator of `era5_temperature.py`: one hour of temperature anomalies.

    A(t+1) = ρ A(t) + exp(-a/τ) g(A(t), A(t-1), A(t-3), yesterday; hour, place)

with the age a of the forecast and g = a convolutional net on a grid of 1° plus a net of
each grid point alone. Both are odd in the anomalies: 24 days show one course of weather,
and a bias or a preference for warm over cold learnt from it would not be physics. What
the nets know, the advection of what is seen now, is worth less the older a forecast is.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

# Anomalies of these ages, in hours, are seen by the nets: their change is advection.
LAGS = (0, 1, 3)


def pooling(fine, coarse):
    """Matrices that smooth onto a coarse grid, and interpolate back linearly."""
    centre, distance = np.linspace(0, fine - 1, coarse), (fine - 1) / (coarse - 1)
    offset = (np.arange(fine)[None] - centre[:, None]) / distance
    down = np.exp(-2 * offset**2)
    up = np.maximum(0, 1 - np.abs(offset)).T
    down = down / down.sum(1, keepdims=True)
    return down.astype(np.float32), up.astype(np.float32)


def neighbours(z):
    """The 3 x 3 neighbourhood as channels, `(c, h, w)` to `(9 c, h, w)`. A product with
    a matrix is then the convolution, and it is fast in a loop on a CPU."""
    padded = jnp.pad(z, ((0, 0), (1, 1), (1, 1)), mode="edge")
    h, w = z.shape[1:]
    shifts = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts)


class Layer(eqx.Module):
    """tanh(W z) times a gate that depends on hour and place; odd in z."""

    weight: jax.Array
    gate: jax.Array

    def __init__(self, num_in, num_out, *, key):
        scale = 1 / np.sqrt(num_in)
        self.weight = scale * jax.random.normal(key, (num_out, num_in))
        self.gate = jnp.zeros((num_out, 5))

    def __call__(self, z, hour, place):
        gate = (1 + self.gate[:, :4] @ hour)[:, None, None]
        gate = gate + self.gate[:, 4, None, None] * place
        return jnp.tanh(jnp.einsum("oi,ihw->ohw", self.weight, z)) * gate


class Emulator(eqx.Module):
    """One hour: damped anomaly, plus corrections that start at zero."""

    damping: jax.Array
    coarse: list[Layer]
    coarse_out: jax.Array
    local: Layer
    local_out: jax.Array
    trust: float = eqx.field(static=True)

    def __init__(self, *, width=16, local_width=8, trust, key):
        keys = jax.random.split(key, 3)
        channels = len(LAGS) + 2
        self.damping = jnp.log(jnp.array(0.96 / 0.04))
        self.coarse = [
            Layer(9 * channels, width, key=keys[0]),
            Layer(9 * width, width, key=keys[1]),
        ]
        self.coarse_out = jnp.zeros((1, 9 * width))
        self.local = Layer(channels, local_width, key=keys[2])
        self.local_out = jnp.zeros((1, local_width))
        self.trust = trust

    def __call__(self, u, inputs):
        hour, place = inputs.time["hour"], inputs.sample
        a = u["anomaly"]
        z = jnp.concatenate([a[jnp.array(LAGS)], inputs.time["yesterday"]]) / 4
        change = self._coarse(z, hour, place) + jnp.einsum(
            "oi,ihw->ohw", self.local_out, self.local(z, hour, place)
        )
        change = jnp.exp(-u["age"] / self.trust) * change
        new = jax.nn.sigmoid(self.damping) * a[:1] + change
        return {"anomaly": jnp.concatenate([new, a[:-1]]), "age": u["age"] + 1}

    def _coarse(self, z, hour, place):
        (lat_down, lat_up), (lon_down, lon_up) = pooling(33, 9), pooling(49, 13)
        c = jnp.einsum("yh,chw,xw->cyx", lat_down, z, lon_down)
        place = jnp.einsum("yh,chw,xw->cyx", lat_down, place, lon_down)
        for layer in self.coarse:
            c = layer(neighbours(c), hour, place)
        c = jnp.einsum("oi,iyx->oyx", self.coarse_out, neighbours(c))
        return jnp.einsum("hy,cyx,wx->chw", lat_up, c, lon_up)
