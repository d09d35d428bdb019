"""DiT: a transformer told a class and no text [arXiv:2212.09748], on DDPM's betas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.perception import vgg_lpips
from fewstep.registry import nearest
from fewstep.teachers.base import FewSteps, Teacher, TeacherCard
from fewstep.teachers.codecs import VAECodec
from fewstep.teachers.pipelines import FAMILIES
from fewstep.teachers.table import ddim_grid, kind_of, student_scheduler, table_of
from fewstep.types import Condition


class DiT(Backbone):
    """DiTTransformer2DModel.  Condition: "label" [B] int64, the class; the last one is none.

    last: the last index of the table of times that the network was trained on.
    In training the network would itself take some labels away, which is its own training's; here none are.
    Each of its blocks embeds the time anew, so no second time can be added to one embedding.
    """

    def __init__(self, module: nn.Module, last: int = 999) -> None:
        from diffusers.models.embeddings import LabelEmbedding

        super().__init__(module)
        self.last = last
        for part in module.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "transformer_blocks"))

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"label": ()}"""
        return {"label": ()}

    def network_time(self, t: Tensor) -> Tensor:
        """0..last.  In float32, where every index i survives i / last * last."""
        return t.float() * self.last

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw prediction, [B, C, H, W], without that of the variance, where the network makes one."""
        labels = cond.tensors["label"].long()
        return self.module(x, network_time, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


class Classes:
    """Prompts to classes: the number of one, or a name of it; the empty prompt is no class.

    names: name -> number.  count: of classes; their numbers are less, and the count itself is none.
    """

    def __init__(self, names: Mapping[str, int], count: int) -> None:
        self.names, self.count = dict(names), count

    @property
    def prompts(self) -> tuple[str, ...]:
        """One of every class: a name that no other class has, else its number."""
        named = {number: name for name, number in self.names.items()}
        return tuple(named.get(number, str(number)) for number in range(self.count))

    def listed(self) -> dict[str, str]:
        """Number -> all its names, as a pipeline's id2label has them."""
        named: dict[int, list[str]] = {}
        for name, number in self.names.items():
            named.setdefault(number, []).append(name)
        return {str(number): ", ".join(named[number]) for number in sorted(named)}

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> {"label": [B] int64}.  Raises ValueError for a prompt that is no class."""
        labels = torch.tensor([self._number(prompt) for prompt in prompts])
        return Condition({"label": labels}, {"label": torch.tensor([self.count])})

    def _number(self, prompt: str) -> int:
        name = prompt.strip()
        if not name:
            return self.count
        if name in self.names:
            return self.names[name]
        if name.isdecimal() and int(name) < self.count:
            return int(name)
        some = ", ".join(map(repr, list(self.names)[:3]))
        allowed = f", or a class's name, as {some}" if some else "; this pipeline names none of them (id2label)"
        raise ValueError(
            f"prompt {prompt!r} is no class of this teacher, which makes classes and reads no text; give a number in "
            f"0..{self.count - 1}{allowed}.{nearest(name, list(self.names))}"
        )


@FAMILIES.register("DiTPipeline")
def dit(pipe: Any, source: str) -> Teacher:
    """DiT, at the size of its config, which its pipeline always makes.

    Its own prompts are all its classes.  Guidance leads away from no class.
    Raises ValueError for a table of times and a prediction that Stable Diffusion cannot have either.
    """
    config = pipe.transformer.config
    classes, last = Classes(pipe.labels, config.num_embeds_ada_norm), pipe.scheduler.config.num_train_timesteps - 1

    def set_up(pipe: Any, _levels: Tensor, told: Tensor, stochastic: bool) -> dict[str, Any]:
        pipe.scheduler = student_scheduler(pipe.scheduler, stochastic)
        # The pipeline takes its classes' names from its index, and does not save them there by itself.
        pipe.register_to_config(id2label=classes.listed())
        return {"num_inference_steps": len(_told(told, last)), "guidance_scale": 1.0}

    return Teacher(
        denoiser=Denoiser(DiT(pipe.transformer, last), table_of(pipe.scheduler), kind_of(pipe.scheduler)),
        encode=classes,
        codec=VAECodec(pipe.vae),
        shape=(config.in_channels, config.sample_size, config.sample_size),
        card=TeacherCard(source, source),
        prompts=classes.prompts,
        grid=ddim_grid(pipe.scheduler),
        solver="ddim",
        guidance=4.0,
        few_steps=FewSteps("transformer", set_up, seeded=False, tells=partial(_told, last=last), asks="[label]"),
        lpips=vgg_lpips,
    )


def _told(times: Tensor, last: int) -> Tensor:
    """A student's times [N] on the network's scale, which are its scheduler's own: the pipeline's call takes none.

    Of N equal steps from the last time, the scheduler with fresh noise rounds up, and that without to the nearest.
    Raises ValueError for others, and for N in which the two differ.
    """
    passed = torch.arange(len(times)) * (last + 1) / len(times)
    up, near = last - passed.floor(), (last + 1 - passed).round() - 1
    if not (torch.equal(times.round(), up.to(times)) and torch.equal(up, near)):
        told = ", ".join(f"{time:g}" for time in times.round().tolist())
        raise ValueError(
            f"this pipeline's call takes no times: its own are 1, 2, 4, 5, 8 or 10 equal steps from {last}, and the "
            f"student's are {told}; use it through fewstep.load_student, or distil in so many steps with no shift, "
            "method.first_time=1, or SiD's method.init_sigma=null"
        )
    return times.round()
