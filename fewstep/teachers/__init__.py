"""Teachers: pretrained diffusion models behind one bundle.  Closed-form ones need no weights."""

from fewstep.teachers import pipelines  # noqa: F401 - registers the teachers that are diffusers pipelines
from fewstep.teachers.base import TEACHERS, Teacher, TeacherCard, register_teacher
from fewstep.teachers.closed_form import gaussian, mixture

__all__ = ["TEACHERS", "Teacher", "TeacherCard", "gaussian", "mixture", "register_teacher"]
