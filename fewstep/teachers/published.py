"""Published teachers by name: which hub repository, at which commit, under which licence; and their networks' configs.

A name is loaded from the hub, or from a folder or another repository of the same layout with the option `source`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fewstep.teachers.base import TEACHERS, Teacher
from fewstep.teachers.pipelines import from_pipeline
from fewstep.teachers.single import is_single

ARCHITECTURES = Path(__file__).parent / "architectures"
"""The config of each one's network as diffusers stores it, so that it can be built without a download."""

RESTRICTIONS = {
    "non-commercial": "its licence allows no commercial use",
    "gated": "its licence must be accepted on its page on the hub",
}
"""What binds the users of some teachers, in words."""

log = logging.getLogger("fewstep")


@dataclass(frozen=True)
class Published:
    """A teacher on the hub.

    about: one line.  pipeline: its class in diffusers.  source, revision: repository and commit.  licence: as its card
    names it.  parameters: of the network that is distilled, in millions.  scheduler: what counts of its scheduler's
    config.  tokens: of its encoded text.  vae_scale: pixels per latent.  boundary: the time at which a second network
    of the same config takes over.  caution: what to know before it is fetched.  restrictions: of RESTRICTIONS; they
    bind a student, too.
    """

    name: str
    about: str
    pipeline: str
    source: str
    revision: str
    licence: str
    parameters: int
    scheduler: Mapping[str, Any] = field(hash=False)
    tokens: int = 77
    vae_scale: int = 8
    boundary: float | None = None
    caution: str = ""
    restrictions: tuple[str, ...] = ()

    def __call__(self, *, source: str | None = None, revision: str | None = None, **options: Any) -> Teacher:
        """Load it.  source: a folder, file or hub id in its place; revision: of that; options: of `from_pipeline`.

        Raises as `load_teacher`, and ValueError for a source that is another kind of pipeline.
        """
        _warn(self)
        pinned = self.revision if source is None else None
        given = {name: value for name, value in {"source": source, "revision": revision}.items() if value is not None}
        if source is not None and is_single(source):
            options = {"config": f"{self.source}@{self.revision}"} | options
        loaded = from_pipeline(source or self.source, revision=revision or pinned, family=self.pipeline, **options)
        words = tuple(RESTRICTIONS[name] for name in self.restrictions)
        told = {"name": self.name, "licence": self.licence, "description": self.about, "restrictions": words}
        card = replace(loaded.card, **told)
        # With its dtype always: a run of this very teacher must not take its recipe's.
        return replace(loaded, card=card, options=given | {"dtype": "fp32"} | options)

    def architecture(self) -> dict[str, Any]:
        """The config of the network that is distilled, as diffusers' from_config takes it."""
        return json.loads((ARCHITECTURES / f"{self.name}.json").read_text(encoding="utf-8"))


@cache
def _warn(teacher: Published) -> None:
    """Say once in a run, by its first process, what binds the users of this teacher."""
    if teacher.restrictions and os.environ.get("RANK", "0") == "0":
        words = ", and ".join(RESTRICTIONS[name] for name in teacher.restrictions)
        log.warning(
            "teacher %r is restricted: %s. A student made of it is bound by that licence, too (%s).",
            teacher.name,
            words,
            teacher.licence,
        )


BETAS = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
"""Stable Diffusion's."""
LINEAR_BETAS = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}
"""PixArt's."""
DDPM_BETAS = LINEAR_BETAS | {"_class_name": "DDIMScheduler", "clip_sample": False}
SHIFTED_BY_3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SHIFTED_BY_6 = SHIFTED_BY_3 | {"shift": 6.0}
SHIFTED_BY_SIZE = SHIFTED_BY_3 | {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SHIFTED_TO_AN_END = SHIFTED_BY_SIZE | {
    "shift": 1.0,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
SHIFTED_BY_ROOT = {  # linearly, by the root of the number of tokens
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
}
DPM_SHIFTED_BY_3 = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,  # its makers' for 480p; 5 for 720p
}

PUBLISHED = (
    Published(
        "sd15",
        "Stable Diffusion 1.5, 512x512, eps",
        "StableDiffusionPipeline",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "CreativeML Open RAIL-M",
        860,
        BETAS,
    ),
    Published(
        "sd21-base",
        "Stable Diffusion 2.1 base, 512x512, eps",
        "StableDiffusionPipeline",
        "stabilityai/stable-diffusion-2-1-base",
        "5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06",
        "CreativeML Open RAIL++-M",
        866,
        BETAS,
        caution="its repository may no longer be public: name a copy with --set teacher.source=FOLDER",
    ),
    Published(
        "sd21",
        "Stable Diffusion 2.1, 768x768, v",
        "StableDiffusionPipeline",
        "stabilityai/stable-diffusion-2-1",
        "5cae40e6a2745ae2b01ad92ae5043f95f23644d6",
        "CreativeML Open RAIL++-M",
        866,
        BETAS | {"prediction_type": "v_prediction"},
        caution="its repository may no longer be public: name a copy with --set teacher.source=FOLDER",
    ),
    Published(
        "sdxl",
        "Stable Diffusion XL 1.0 base, 1024x1024, eps",
        "StableDiffusionXLPipeline",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        "CreativeML Open RAIL++-M",
        2567,
        BETAS,
    ),
    Published(
        "dit-xl-2-256",
        "DiT-XL/2 of ImageNet's thousand classes, 256x256, eps",
        "DiTPipeline",
        "facebook/DiT-XL-2-256",
        "eab87f77abd5aef071a632f08807fbaab0b704d0",
        "CC-BY-NC-4.0",
        750,
        DDPM_BETAS,
        tokens=0,
        caution="its weights on the hub are pickles, which are not read: save a copy of its DiTPipeline by "
        "save_pretrained, where that does no harm, and name it with --set teacher.source=FOLDER",
        restrictions=("non-commercial",),
    ),
    Published(
        "pixart-sigma",
        "PixArt-Sigma, 1024x1024, eps",
        "PixArtSigmaPipeline",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "e102b3591cc82e97071b8b4cb90d834d0c487207",
        "CreativeML Open RAIL++-M",
        611,
        LINEAR_BETAS,
        tokens=300,
    ),
    Published(
        "sd3-medium",
        "Stable Diffusion 3 medium, 1024x1024, flow",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "ea42f8cef0f178587cf766dc8129abd379c90671",
        "Stability AI Community License",
        2028,
        SHIFTED_BY_3,
        restrictions=("gated",),
    ),
    Published(
        "sd35-medium",
        "Stable Diffusion 3.5 medium, 1024x1024, flow",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-medium",
        "b940f670f0eda2d07fbb75229e779da1ad11eb80",
        "Stability AI Community License",
        2243,
        SHIFTED_BY_3,
        restrictions=("gated",),
    ),
    Published(
        "sd35-large",
        "Stable Diffusion 3.5 large, 1024x1024, flow",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-large",
        "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        "Stability AI Community License",
        8057,
        SHIFTED_BY_3,
        restrictions=("gated",),
    ),
    Published(
        "flux-dev",
        "FLUX.1 dev, 1024x1024, flow, guidance embedded",
        "FluxPipeline",
        "black-forest-labs/FLUX.1-dev",
        "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        "FLUX.1 [dev] Non-Commercial License",
        11901,
        SHIFTED_BY_SIZE,
        restrictions=("non-commercial", "gated"),
    ),
    Published(
        "sana",
        "Sana, 1.6 billion, 1024x1024, flow",
        "SanaPipeline",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "d1b54936033cd7d45410ecadd692c5c502a19a38",
        "NSCL v2-custom",
        1604,
        DPM_SHIFTED_BY_3,
        tokens=300,
        vae_scale=32,
        restrictions=("non-commercial",),
    ),
    Published(
        "sana-0.6b",
        "Sana, 0.6 billion, 1024x1024, flow",
        "SanaPipeline",
        "Efficient-Large-Model/Sana_600M_1024px_diffusers",
        "b3ddc862873249650ed9f6ba90e92ede3083bb0d",
        "NSCL v2-custom",
        592,
        DPM_SHIFTED_BY_3,
        tokens=300,
        vae_scale=32,
        restrictions=("non-commercial",),
    ),
    Published(
        "cogview4",
        "CogView4, 6 billion, 1024x1024, flow",
        "CogView4Pipeline",
        "zai-org/CogView4-6B",
        "63a52b7f6dace7033380cd6da14d0915eab3e6b5",
        "Apache-2.0",
        6369,
        SHIFTED_BY_ROOT,
        tokens=1024,
    ),
    Published(
        "z-image",
        "Z-Image, not distilled, 1024x1024, flow",
        "ZImagePipeline",
        "Tongyi-MAI/Z-Image",
        "04cc4abb7c5069926f75c9bfde9ef43d49423021",
        "Apache-2.0",
        6155,
        SHIFTED_BY_6,
        tokens=512,
    ),
    Published(
        "qwen-image",
        "Qwen-Image, 20 billion, 1024x1024, flow",
        "QwenImagePipeline",
        "Qwen/Qwen-Image",
        "75e0b4be04f60ec59a75f475837eced720f823b6",
        "Apache-2.0",
        20430,
        SHIFTED_TO_AN_END,
        tokens=512,
    ),
    Published(
        "wan2.1-1.3b",
        "Wan 2.1 text to video, 1.3 billion, 81 frames of 480x832, flow",
        "WanPipeline",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "0fad780a534b6463e45facd96134c9f345acfa5b",
        "Apache-2.0",
        1419,
        UNIPC,
        tokens=512,
    ),
    Published(
        "wan2.1-14b",
        "Wan 2.1 text to video, 14 billion, 81 frames of 480x832, flow",
        "WanPipeline",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
        "Apache-2.0",
        14288,
        UNIPC,
        tokens=512,
    ),
    Published(
        "wan2.2-a14b",
        "Wan 2.2 text to video, two networks of 14 billion by noise, 81 frames of 480x832, flow",
        "WanPipeline",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "5be7df9619b54f4e2667b2755bc6a756675b5cd7",
        "Apache-2.0",
        14288,
        UNIPC,
        tokens=512,
        boundary=0.875,
    ),
)

for _teacher in PUBLISHED:
    TEACHERS.register(_teacher.name)(_teacher)
