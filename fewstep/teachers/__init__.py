"""Teachers: pretrained diffusion models behind one bundle.  Closed-form ones need no weights."""

from fewstep.teachers import fashion, stable_diffusion, transformers  # noqa: F401 - register teachers and families
from fewstep.teachers.base import TEACHERS, Teacher, TeacherCard, register_teacher
from fewstep.teachers.closed_form import gaussian, mixture

__all__ = ["TEACHERS", "Teacher", "TeacherCard", "gaussian", "mixture", "register_teacher"]
