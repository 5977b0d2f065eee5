"""The wrapper that turns a raw network into a flow map: the average velocity between two times of the linear path."""

import torch
from torch import Tensor, nn

from .layers import plain_kernels
from .preconditioning import Wrapper, wide

TIMES = {"t": 1, "t,t-r": 2, "t,r": 2, "t-r": 1}  # what the network is told of the two times, and in how many columns
PRECONDS = ("edm", "trigflow", "flow")
LABELS = ("log", "log250", "t", "time")


def columns(times: str, guidance_inputs: bool = False) -> int:
    """How many numbers a sample the raw network is told: its argument `told`. ValueError for unknown times."""
    if times not in TIMES:
        raise ValueError(f"times is {times!r}; it must be {', '.join(map(repr, TIMES))}")
    return TIMES[times] + (3 if guidance_inputs else 0)


class FlowMap(Wrapper):
    """u(z, t, r), the average velocity from t to r: z_r = z_t - (t - r) u, z_t = (1 - t) x + t e, 0 <= r <= t <= 1.

    times: what the network is told of them. "t": r is ignored (flow matching); "t,t-r" (MeanFlow, 2505.13447; SoFlow,
    2512.15657, in its released code's DiT too); "t,r" (2505.13447 tab. 1c); "t-r" alone (iMF, 2512.02012).
    precond: "flow": u is the network's own output of z. "edm", "trigflow": u = (z - D(z / (1 - t); t / (1 - t))) / t
    of that preconditioning's denoiser D, so that its weights start a flow map exactly where r = t:
        u = (t - sd^2 (1 - t)) z / s^2 - (sd / s) F(z / s),  s^2 = t^2 + sd^2 (1 - t)^2  (trigflow: F's sign turned).
    c_noise: the label of t. "time": t itself; else Preconditioner's, of sigma = t / (1 - t) up to sigma_max. t - r and
    r are told as they are.
    heads: 2 where the network has a second output, iMF's velocity at t; see `both`.
    guidance_inputs: the network is also told 1 - 1/w, t_min and t_max: the guidance it is asked for and its interval.
    The arithmetic is float32 (float64 for float64 z), whatever the network computes in.
    """

    clock = "time"  # what the calls are told of the noise: t from 0 to 1

    def __init__(
        self,
        model: nn.Module,
        times: str = "t,t-r",
        precond: str = "flow",
        c_noise: str = "time",
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        heads: int = 1,
        guidance_inputs: bool = False,
    ) -> None:
        super().__init__(model, precond, c_noise, sigma_data, sigma_max)
        if precond not in PRECONDS:
            raise ValueError(f"precond is {precond!r}; a flow map's must be {', '.join(PRECONDS)}")
        if c_noise not in LABELS:
            raise ValueError(f"c_noise is {c_noise!r}; it must be {', '.join(LABELS)}")
        if times == "t-r" and c_noise != "time":
            raise ValueError(f"c_noise is {c_noise!r}, a label of t; with times 't-r' it must be time")
        told, knows = columns(times, guidance_inputs), getattr(model, "told", None)
        if knows not in (None, told):
            raise ValueError(f"the network is told {knows} numbers a sample, and times {times!r} has {told}")
        self.times = times
        self.heads = heads
        self.guidance_inputs = guidance_inputs

    def forward(
        self, z: Tensor, t: Tensor, r: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None,
        condition: Tensor | None = None, dropout_keys: Tensor | None = None, guidance: Tensor | None = None,
        interval: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """u (B, ...) of z's shape; float32, or float64 if z is float64.

        z: (B, ...) at the times t (B,); r (B,) where it goes. Conditions as Preconditioner's. With guidance_inputs
        only: guidance (B,), the weight w >= 1 (None: 1, unguided), interval (B, 2), the times [t_min, t_max] where it
        guides (None: all). ValueError for labels, conditions or guidance that the network does not take.
        """
        given = (class_labels, augment_labels, condition, dropout_keys)
        return self._velocities(z, t, r, given, guidance, interval, **self._first())[0]

    def both(
        self, z: Tensor, t: Tensor, r: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None,
        condition: Tensor | None = None, dropout_keys: Tensor | None = None, guidance: Tensor | None = None,
        interval: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(u, v): the average velocity and the second head's, at t; shapes as in `forward`. ValueError for one head."""
        if self.heads != 2:
            raise ValueError("this flow map has one head; build it with heads: 2")
        given = (class_labels, augment_labels, condition, dropout_keys)
        return self._velocities(z, t, r, given, guidance, interval)

    def jvp(
        self, z: Tensor, t: Tensor, r: Tensor, dz: Tensor, dt: Tensor, dr: Tensor, guidance: Tensor | None = None,
        interval: Tensor | None = None, **conditions: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(u, its derivative along (dz, dt, dr)); shapes as in `forward`, dt and dr (B,); one pass in forward mode."""
        z, t, r, dt, dr = self._cast(z, t, r, dt, dr)
        dz = dz.to(z.dtype)
        (a, b, c_in, told), (da, db, dc_in, dtold) = torch.func.jvp(self.coefficients, (t, r), (dt, dr))
        told, dtold = self._told(told, guidance, interval), self._told(dtold, None, None, still=True)
        dtype = next(self.model.parameters()).dtype
        labels, more = self._given(z, dtype, **conditions)
        more |= self._first()
        places = (wide(c_in, z) * z, told, wide(c_in, z) * dz + wide(dc_in, z) * z, dtold)
        with self._casting(z), plain_kernels():  # the fused kernels have no forward mode
            network_jvp = self.compiled_jvp or self.network_jvp
            F, dF = network_jvp(*(v.to(dtype) for v in places), labels, more)
        F, dF = (v.to(z.dtype)[:, : z.shape[1]] for v in (F, dF))
        u = wide(a, z) * z + wide(b, z) * F
        return u, wide(a, z) * dz + wide(da, z) * z + wide(b, z) * dF + wide(db, z) * F

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c_in, told): u = a z + b F(c_in z, told); of times (B,), (B,) each, but told (B, 1 or 2)."""
        label = {"t": (self.time_label(t),), "t-r": (t - r,)}
        told = label.get(self.times) or (self.time_label(t), r if self.times == "t,r" else t - r)
        told = torch.stack(told, dim=1)
        if self.precond == "flow":
            return 0 * t, torch.ones_like(t), torch.ones_like(t), told
        s = (t**2 + self.sigma_data**2 * (1 - t) ** 2).sqrt()
        a = (t - self.sigma_data**2 * (1 - t)) / s**2
        b = self.sigma_data / s
        return a, b if self.precond == "trigflow" else -b, 1 / s, told

    def time_label(self, t: Tensor) -> Tensor:
        """c_noise(t), what the network is told of the time t; (B,) -> (B,)."""
        if self.c_noise == "time":
            return t
        t = t.clamp(max=self.sigma_max / (1 + self.sigma_max))  # sigma has no end at t = 1
        return self.noise_label(t / (1 - t))

    def _velocities(
        self, z: Tensor, t: Tensor, r: Tensor, given: tuple[Tensor | None, ...], guidance: Tensor | None,
        interval: Tensor | None, **first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The velocity of each head, (B, ...)."""
        z, t, r = self._cast(z, t, r)
        a, b, c_in, told = self.coefficients(t, r)
        told = self._told(told, guidance, interval)
        dtype = next(self.model.parameters()).dtype
        labels, more = self._given(z, dtype, *given)
        with self._casting(z):
            F = self.model((wide(c_in, z) * z).to(dtype), told.to(dtype), *labels, **more, **first).to(z.dtype)
        return tuple(wide(a, z) * z + wide(b, z) * f for f in F.split(z.shape[1], dim=1))

    def _first(self) -> dict[str, bool]:
        """Asks a network whose heads have layers of their own for the first alone."""
        return {"first": True} if self.heads == 2 and getattr(self.model, "several_heads", False) else {}

    def _told(self, times: Tensor, guidance: Tensor | None, interval: Tensor | None, still: bool = False) -> Tensor:
        """What the network is told, (B, K) or, for K = 1, (B,): the times (B, 1 or 2) and, where it takes them,
        guidance and interval; still: their derivatives, 0."""
        if not self.guidance_inputs:
            if guidance is not None or interval is not None:
                raise ValueError("this network is not told guidance or its interval; build it with guidance_inputs")
            return times[:, 0] if times.shape[1] == 1 else times
        if still:
            return torch.cat([times, times.new_zeros(len(times), 3)], dim=1)
        batch = times.shape[0]  # this, and the order below: torch.export must not take it for a constant
        w = torch.as_tensor(1.0 if guidance is None else guidance).to(times)
        limits = torch.as_tensor((0.0, 1.0) if interval is None else interval).to(times)
        if w.shape not in ((batch,), ()) or limits.shape not in ((batch, 2), (2,)):
            found = f"guidance has shape {tuple(w.shape)} and interval {tuple(limits.shape)}"
            raise ValueError(f"{found}; a batch of {batch} needs ({batch},) and ({batch}, 2)")
        told = (1 - 1 / w).expand(batch)[:, None], limits.expand(batch, 2)
        return torch.cat([times, *told], dim=1)
