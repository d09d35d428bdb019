"""The flags of the command line, each with its help.  No torch here: --help must answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Text = str | None
Number = int | None

Teacher = Annotated[Text, typer.Option(help="Registered name, local diffusers folder, .safetensors file or hub id.")]
Method = Annotated[Text, typer.Option(help="Distillation method; see `fewstep list methods`.")]
Config = Annotated[Path | None, typer.Option(help="Recipe, or a run's config.yaml; by default the packaged recipe.")]
NumSteps = Annotated[Number, typer.Option(help="Sampling steps of the student.")]
Iterations = Annotated[Number, typer.Option(help="Trainer iterations.")]
GlobalBatch = Annotated[Number, typer.Option(help="Global batch of one optimiser step.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate of generator and critic.")]
Seed = Annotated[Number, typer.Option(help="Seed of everything random.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="Text file, one prompt a line, or .jsonl, .parquet, .tar, or a folder of these; by default the "
        "teacher's prompts."
    ),
]
NegativePrompt = Annotated[Text, typer.Option(help="What guidance moves away from; by default the empty prompt.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Captioned pictures for the GAN: folder, .tar or folder of .tar; by default the teacher's own."),
]
Pairs = Annotated[Path | None, typer.Option(help="Folder that `fewstep pairs` wrote, for methods that need one.")]
Student = Annotated[Path | None, typer.Option(help="Run whose student the generator starts from, not the teacher.")]
TrainDevice = Annotated[Text, typer.Option(help="auto, cpu or cuda; auto is cuda if there is one.")]
Precision = Annotated[Text, typer.Option(help="fp32, bf16 or fp16.")]
Sharing = Annotated[Text, typer.Option(help="How the trio holds its weights: copies, lora or lora-fake.")]
LoraRank = Annotated[Number, typer.Option(help="Rank of the adapters of lora and lora-fake.")]
LoraAlpha = Annotated[float | None, typer.Option(help="Their scale is alpha / rank.")]
LoraTargets = Annotated[
    list[str] | None,
    typer.Option(help="End of the names of the layers that get one, as to_q; repeatable. By default all."),
]
Checkpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing", help="Less memory: activations are computed again."),
]
Resolution = Annotated[Number, typer.Option(help="Pixels of a side; by default those the teacher was trained at.")]
Gpus = Annotated[int, typer.Option(help="GPUs among which the global batch is divided.")]
Fsdp = Annotated[
    bool, typer.Option("--fsdp", help="Weights, averages, gradients and optimiser states divided among the GPUs.")
]
GpuMemory = Annotated[
    float | None, typer.Option(help="GiB of one GPU; if it does not fit, what to change is looked for.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
TensorBoard = Annotated[bool | None, typer.Option("--tensorboard", help="Write the figures for TensorBoard, too.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; by default runs/TEACHER-METHOD.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint of --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in --out first.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as method.guidance=2. Repeatable.")
]
Plugin = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file that registers methods or teachers. Repeatable."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto is cuda if there is one.")]
BatchSize = Annotated[
    Number,
    typer.Option(
        help="Images made at a time, by default by their size; what an image is made of does not depend on it."
    ),
]
Which = Annotated[str, typer.Option(help="Checkpoint: best (by the running figure) or last.")]
RecomputeTeacher = Annotated[
    bool, typer.Option("--recompute-teacher", help="Sample the teacher anew instead of its stored row.")
]
Untrained = Annotated[bool, typer.Option(help="Also measure the student as it was before training.")]
Protocol = Annotated[
    Text, typer.Option(help="Published protocol to measure by, as dmd2-coco30k; see `fewstep list protocols`.")
]
Reference = Annotated[
    Path | None, typer.Option(help="What the protocol holds samples against: .npz of moments, or folder of images.")
]
Images = Annotated[Path | None, typer.Option(help="Images of RUN that were made elsewhere, measured in its place.")]
Also = Annotated[
    list[str] | None,
    typer.Option(help="Further figures of the same pass: kid, manifold or inception_score. Repeatable."),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Of the protocol's extractor: file or folder; by default $FEWSTEP_WEIGHTS is searched."),
]
Sha256 = Annotated[Text, typer.Option("--sha256", help="Of the extractor's weights, as their publisher gives it.")]
Unverified = Annotated[
    bool, typer.Option("--unverified", help="Take weights of another hash; their figures are named so.")
]
Clip = Annotated[
    Path | None,
    typer.Option(help="CLIPModel folder for a CLIP score, too; open_clip's for dmd2-coco30k and dmd2-sdxl-coco10k."),
]
ClipSha256 = Annotated[Text, typer.Option("--clip-sha256", help="Of open_clip's weights, as their publisher gives it.")]
ImagePrompts = Annotated[
    Path | None,
    typer.Option(help="Prompts of the images, line i of image i by name; or those to sample with; or a benchmark's."),
]
Score = Annotated[
    Text, typer.Option(help="Score of another environment, as hpsv2.1, or an adapter's FILE.py; see `list scores`.")
]
Python = Annotated[
    Path | None,
    typer.Option(help="Of --score: the environment's bin/python that has the package; by default this one."),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of --score's adapter. Repeatable.")
]
Timeout = Annotated[float | None, typer.Option(help="Of --score: seconds until it is given up; by default a day.")]
