"""Teachers: pretrained diffusion models behind one bundle.  Closed-form ones need no weights."""

from fewstep.teachers import (  # noqa: F401 - register teachers, families and networks in pieces
    dit,
    fashion,
    flux,
    pixart,
    point_split,
    published,
    qwen,
    sana,
    sd3,
    stable_diffusion,
    transformers,
    wan,
    z_image,
)
from fewstep.teachers.base import TEACHERS, Teacher, TeacherCard, register_teacher
from fewstep.teachers.closed_form import gaussian, mixture

__all__ = ["TEACHERS", "Teacher", "TeacherCard", "gaussian", "mixture", "register_teacher"]
