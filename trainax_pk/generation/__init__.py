"""Generation of fields: networks that turn noise into what could be there.

A field `(channels, *space)` is drawn given another (a coarse field, static inputs, the
present state) or alone. Configurations train on single noise levels
(`tx.configuration.Denoising`, `FieldFlowMatching`), samplers draw, and
`tx.callback.Generation` scores whole draws on the way.

To add a sampler, see `AbstractSampler`.
"""

from trainax_pk.generation._fields import Fields, as_fields, coarsen, upsample
from trainax_pk.generation._models import Denoiser, Regression, Velocity
from trainax_pk.generation._samplers import (
    AbstractSampler,
    EDMSampler,
    FlowSampler,
    Generator,
    generate,
)
from trainax_pk.generation._scales import FieldScales
from trainax_pk.generation._unet import UNet

__all__ = [
    "AbstractSampler",
    "Denoiser",
    "EDMSampler",
    "FieldScales",
    "Fields",
    "FlowSampler",
    "Generator",
    "Regression",
    "UNet",
    "Velocity",
    "as_fields",
    "coarsen",
    "generate",
    "upsample",
]
