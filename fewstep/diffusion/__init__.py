"""The mathematics of diffusion, usable alone: schedules, predictions, laws of time, guidance and samplers."""

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.jvp import Derivative, check_jvp, directional_derivative
from fewstep.diffusion.prediction import Denoise, Prediction, raw_of
from fewstep.diffusion.reschedule import on_schedule
from fewstep.diffusion.samplers import State, few_step, ode, student_grid, time_grid, trajectory
from fewstep.diffusion.schedules import EDM, Coefficients, NoiseSchedule, RectifiedFlow, TrigFlow, VPTable, like, match
from fewstep.diffusion.times import (
    Clamped,
    DiscreteUniform,
    Interval,
    Law,
    LogitNormal,
    LogNormalSigma,
    Shifted,
    Uniform,
    shift_time,
)

__all__ = [
    "EDM",
    "Clamped",
    "Coefficients",
    "Denoise",
    "Derivative",
    "DiscreteUniform",
    "Interval",
    "Law",
    "LogNormalSigma",
    "LogitNormal",
    "NoiseSchedule",
    "Prediction",
    "RectifiedFlow",
    "Shifted",
    "State",
    "TrigFlow",
    "Uniform",
    "VPTable",
    "check_jvp",
    "directional_derivative",
    "few_step",
    "guided",
    "like",
    "match",
    "ode",
    "on_schedule",
    "raw_of",
    "shift_time",
    "student_grid",
    "time_grid",
    "trajectory",
]
