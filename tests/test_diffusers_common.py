"""diffusers' own common tests, on our schedulers, on `OneStepPipeline` and on the students of every kind of
text-to-image teacher.

They are not in diffusers' wheel, so they run where a checkout of diffusers is given:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers /tmp/diffusers
    DIFFUSERS_CHECKOUT=/tmp/diffusers pytest tests/test_diffusers_common.py
"""

import importlib
import inspect
import os
import sys
from unittest import mock

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler, SanaPipeline
from diffusers.utils import is_torchsde_available
from families import CALLS, tiny_pipeline
from test_d_ode import build, table

from diffusers_onestep import OneStepPipeline, OneStepScheduler, Teacher
from diffusers_onestep.pipelines import pipeline_text_to_image as students
from diffusers_onestep.schedulers import student_scheduler

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("`DIFFUSERS_CHECKOUT` must be the folder of a diffusers checkout", allow_module_level=True)
sys.path.insert(0, CHECKOUT)  # before other packages that install a `tests`
schedulers = importlib.import_module("tests.schedulers.test_schedulers")
pipelines = importlib.import_module("tests.pipelines.testing_utils")
params = importlib.import_module("tests.pipelines.pipeline_params")
sys.path.remove(CHECKOUT)


def does_not_apply(reason):
    @pytest.mark.skip(reason=reason)
    def test(self):
        pass

    return test


class Scheduler:
    @property
    def scheduler_classes(self):
        return (type(self.scheduler()),)

    def get_scheduler_config(self, **config):
        own = self.scheduler().config
        return {k: v for k, v in own.items() if not k.startswith("_") and k not in own["_use_default_values"]} | config

    @pytest.mark.skipif(not is_torchsde_available(), reason="makes a scheduler that needs torchsde")
    def test_compatibles(self):
        super().test_compatibles()


# OneStepScheduler


class TestFreeSteps(Scheduler, schedulers.SchedulerCommonTest):
    def scheduler(self):
        return OneStepScheduler()


class FewSteps(Scheduler):
    timesteps = [999, 874, 749, 624, 499, 374, 249, 124]
    default_num_inference_steps = 8

    def scheduler(self):
        return OneStepScheduler(student_timesteps=self.timesteps, init_noise_sigma=0.9)

    test_trained_betas = does_not_apply("two betas hold no timestep of the student's")


class TestFewSteps(FewSteps, schedulers.SchedulerCommonTest):
    pass


class OneStep(FewSteps):
    timesteps = [440]
    default_num_inference_steps = 1
    test_add_noise_device = does_not_apply("adds noise at the sixth timestep of a run, where there is one")


class TestOneStep(OneStep, schedulers.SchedulerCommonTest):
    pass


class TestTrajectory(OneStep, schedulers.SchedulerCommonTest):
    def scheduler(self):
        return OneStepScheduler(student_timesteps=[0], parameterization="trajectory", start_timestep=999)


EDM = {"schedule_type": "edm", "prediction_type": "edm"}


class TestEDM(Scheduler, schedulers.SchedulerCommonTest):
    def scheduler(self):
        return OneStepScheduler(**EDM)

    test_trained_betas = does_not_apply("EDM has no betas")


class TestTrajectoryOfEDM(OneStep, schedulers.SchedulerCommonTest):
    def scheduler(self):
        return OneStepScheduler(student_timesteps=[-1.5], parameterization="trajectory", start_timestep=1.095, **EDM)

    test_trained_betas = does_not_apply("EDM has no betas")


class TestFlow(Scheduler, schedulers.SchedulerCommonTest):
    def scheduler(self):
        return OneStepScheduler(schedule_type="flow", prediction_type="flow_prediction")

    test_trained_betas = does_not_apply("flow has no betas")


# distilled solvers


class Distilled(Scheduler):
    """With a table of the fifty steps that diffusers' tests take."""

    def scheduler(self):
        solver = build(self.solver)
        solver.set_timesteps(50)
        return build(self.solver, dode_tables=table(solver, 50, [0.1] * len(solver.timesteps)))


class EDMDistilled(Distilled):
    test_trained_betas = does_not_apply("EDM has no betas")

    def setUp(self):
        # diffusers' tests ask `EDMEulerScheduler` by name, and it alone, for timesteps of its schedule
        patch = mock.patch.object(schedulers, "EDMEulerScheduler", type(build("edm-euler")))
        patch.start()
        self.addCleanup(patch.stop)


for solver in [
    "ddim",
    "plms",
    "ipndm",
    "dpm2",
    "dpm3",
    "deis",
    "single2",
    "euler-karras",
    "heun",
    "edm-euler",
    "edm-dpm",
]:
    name = "TestDistilled_" + solver.replace("-", "_")
    bases = (EDMDistilled if solver.startswith("edm-") else Distilled, schedulers.SchedulerCommonTest)
    globals()[name] = type(name, bases, {"solver": solver})


# OneStepPipeline


class Pipeline(
    pipelines.PipelineTesterMixin,
    pipelines.PipelineOffloadTesterMixin,
    pipelines.GroupOffloadTesterMixin,
    pipelines.LayerwiseCastingTesterMixin,
    pipelines.BasePipelineTesterConfig,
):
    pipeline_class = OneStepPipeline
    required_input_params_in_call_signature = params.UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_input_params = params.UNCONDITIONAL_IMAGE_GENERATION_BATCH_PARAMS
    output_shape = (1, 16, 16)

    @pytest.fixture(autouse=True)
    def safetensors(self, monkeypatch):
        """diffusers' tests save pickles, which our loader refuses."""
        save = self.pipeline_class.save_pretrained
        monkeypatch.setattr(
            self.pipeline_class,
            "save_pretrained",
            lambda pipe, folder, safe_serialization=True, **kwargs: save(pipe, folder, **kwargs),
        )

    classes = None
    timesteps, init_noise_sigma = [440], 0.93
    inputs = {"batch_size": 1}

    def get_dummy_components(self):
        scheduler = student_scheduler(DDPMScheduler(), "epsilon", self.timesteps, self.init_noise_sigma)
        return {"unet": tiny_unet(self.classes), "scheduler": scheduler}

    def get_dummy_inputs(self):
        steps = len(self.timesteps)
        return self.inputs | {"generator": self.get_generator(0), "num_inference_steps": steps, "output_type": "pt"}

    test_cfg = does_not_apply("a student refuses guidance at sampling time")
    test_callback_cfg = does_not_apply("a student refuses guidance at sampling time")


class TestUnconditionalPipeline(Pipeline):
    test_num_images_per_prompt = does_not_apply("asks for more images through labels")


class TestFewStepPipeline(TestUnconditionalPipeline):
    timesteps, init_noise_sigma = [999, 749, 499, 249], 1.0


class TestClassConditionalPipeline(Pipeline):
    required_input_params_in_call_signature = params.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = params.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    classes = 3
    inputs = {"class_labels": 1}


# students of text-to-image teachers


class TextToImage(Pipeline):
    required_input_params_in_call_signature = frozenset(["prompt", "height", "width", "guidance_scale"])
    batch_input_params = frozenset(["prompt"])
    output_shape = (3, 16, 16)
    family, cls, timestep = "sd", students.OneStepStableDiffusionPipeline, 999

    @property
    def pipeline_class(self):
        return self.cls

    @property
    def side(self):
        return self.output_shape[-1]

    def get_dummy_components(self):
        pipeline = tiny_pipeline(self.family)
        network = getattr(pipeline, "unet", None) or pipeline.transformer
        made = Teacher(pipeline, resolution=self.side).student_pipeline(
            network, student_timesteps=[self.timestep], init_noise_sigma=1.0
        )
        names = inspect.signature(self.cls.__init__).parameters
        settings = {k: v for k, v in made.config.items() if k in names and k not in made.components}
        return dict(made.components) | {k: v for k, v in settings.items() if k in self.settings}

    settings = ()

    def get_dummy_inputs(self):
        size = {"height": self.side, "width": self.side} | CALLS.get(self.family, {})
        given = {"prompt": "a cat", "generator": self.get_generator(0), "num_inference_steps": 1}
        return given | {"output_type": "pt"} | size

    def encoded(self):
        """The prompt as its encoders make it."""
        pipe = self.get_pipeline()
        known = inspect.signature(pipe.encode_prompt).parameters
        given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        given |= {"clean_caption": False, "prompt_2": None, "prompt_3": None} | self.encoding
        encoded = pipe.encode_prompt("a cat", **{k: v for k, v in given.items() if k in known})
        return {k: v for k, v in zip(self.embeddings, encoded, strict=False) if k is not None} | {"prompt": None}

    def test_encode_prompt_works_in_isolation(self, base_pipe_output):
        """What the encoders make of a prompt, given to a pipeline that has none, gives the same image."""
        pipe = self.get_pipeline()
        for name in [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))]:
            setattr(pipe, name, None)
        torch.testing.assert_close(self.run_pipe(pipe, **self.encoded()), base_pipe_output, rtol=1e-4, atol=1e-4)

    def test_save_load_optional_components(self, tmp_path):
        """From embeddings, as diffusers' own tests have it where text encoders are among them."""
        inputs = self.get_dummy_inputs() | self.encoded()
        with mock.patch.object(self, "get_dummy_inputs", lambda: inputs | {"generator": self.get_generator(0)}):
            super().test_save_load_optional_components(tmp_path)

    embeddings: tuple = ("prompt_embeds",)
    encoding: dict = {}


class TestStableDiffusion(TextToImage):
    settings = ("requires_safety_checker",)


class TestStableDiffusionXL(TextToImage):
    family, cls = "sdxl", students.OneStepStableDiffusionXLPipeline
    embeddings = ("prompt_embeds", None, "pooled_prompt_embeds")


class TestStableDiffusion3(TextToImage):
    family, cls, timestep = "sd3", students.OneStepStableDiffusion3Pipeline, 1000.0
    embeddings = ("prompt_embeds", None, "pooled_prompt_embeds")


class TestFlux(TextToImage):
    family, cls, timestep = "flux", students.OneStepFluxPipeline, 1000.0
    settings = ("embedded_guidance", "default_sample_size")
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")


class TestPixArtAlpha(TextToImage):
    family, cls = "pixart", students.OneStepPixArtAlphaPipeline
    embeddings = ("prompt_embeds", "prompt_attention_mask")


class TestSana(TextToImage):
    family, cls, timestep = "sana", students.OneStepSanaPipeline, 1000.0
    output_shape = (3, 32, 32)
    embeddings = ("prompt_embeds", "prompt_attention_mask")
    instruction = "complex_human_instruction"  # which the call puts before a prompt
    encoding = {instruction: inspect.signature(SanaPipeline.__call__).parameters[instruction].default}
