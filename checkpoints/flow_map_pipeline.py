"""A flow map as a pipeline of diffusers: `convert.py export --to diffusers` puts this file into the folder it writes.

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipe(16, num_inference_steps=2).images  # PIL's; pipe(4, class_labels=[3, 3, 5, 5], times=[1.0, 0.4])

It needs diffusers, onnxruntime, numpy and torch, and nothing of the project that wrote it.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class FlowMapPipeline(DiffusionPipeline):
    """z <- z - (t - r) u(z, t, r) from each time t to the next, by FlowMapEulerDiscreteScheduler where there is one.

    The network is unet/model.onnx, run by onnxruntime.
    """

    _optional_components = ["scheduler"]
    _session: onnxruntime.InferenceSession | None = None

    def __init__(self, scheduler: Any = None) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The network, read at its first use."""
        if self._session is None:
            path = os.path.join(self.name_or_path, "unet", "model.onnx")
            self._session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        return self._session

    def velocity(self, z: torch.Tensor, t: float, r: float, **conditions: np.ndarray) -> torch.Tensor:
        """u(z, t, r) (B, C, H, W), float32, for conditions (B, ...) that the network takes."""
        times = {name: np.full(len(z), value, np.float32) for name, value in (("t", t), ("r", r))}
        return torch.from_numpy(self.session.run(None, {"z": z.float().cpu().numpy(), **times, **conditions})[0])

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | torch.Tensor | None = None,  # for networks with classes; None: unlabelled
        num_inference_steps: int = 1,
        times: Sequence[float] | None = None,  # descending from 1 (noise); None: even
        latents: torch.Tensor | None = None,  # (B, C, H, W) N(0, 1)
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,  # for networks that are told it
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",  # or "pt": float32 in [0, 1]
    ) -> ImagePipelineOutput:
        """Images, in one evaluation of the network for each time."""
        shapes = {entry.name: entry.shape[1:] for entry in self.session.get_inputs()}
        z = torch.randn(batch_size, *shapes["z"], generator=generator) if latents is None else latents
        conditions = {}
        if "class_labels" in shapes:
            rows = np.zeros((batch_size, *shapes["class_labels"]), np.float32)
            if class_labels is not None:
                rows[np.arange(batch_size), np.asarray(class_labels)] = 1
            conditions["class_labels"] = rows
        if "guidance" in shapes:
            conditions["guidance"] = np.full(batch_size, guidance_scale, np.float32)
            conditions["interval"] = np.tile(np.asarray(guidance_interval, np.float32), (batch_size, 1))
        n = num_inference_steps
        times = [1 - i / n for i in range(n)] if times is None else list(times)
        z = times[0] * z
        if self.scheduler is not None:
            self.scheduler.set_timesteps(sigmas=times)
        for t, r in itertools.pairwise([*times, 0.0]):
            u = self.velocity(z, t, r, **conditions)
            z = z - (t - r) * u if self.scheduler is None else self._step(u, t, r, z)
        images = (z.clamp(-1, 1) + 1) / 2
        return ImagePipelineOutput(
            images if output_type == "pt" else self.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
        )

    def _step(self, u: torch.Tensor, t: float, r: float, z: torch.Tensor) -> torch.Tensor:
        scale = self.scheduler.config.num_train_timesteps
        return self.scheduler.step(u, t * scale, z, r_timestep=r * scale).prev_sample
