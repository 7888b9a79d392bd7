from .denoiser import Denoiser, GuidedDenoiser
from .schedules import NoiseSchedule
from .trainer import train
