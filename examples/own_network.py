"""A network and data of your own, and signals, which are no images: python examples/own_network.py [--quick]

Learns pieces of 64 pixels of the scanlines of a photograph, a real 1-D signal, and compares samples and data: the steps
between neighbours and the correlation of pixels 1, 8 and 32 apart. Five minutes on one CPU core.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image

sys.path.append(str(Path(__file__).resolve().parent.parent))  # this repository, after your own modules
from ema import EMA
from objectives.ect import EasyConsistencyTuning
from sampler import multistep

STEPS, BATCH, LENGTH, SD = 10 if "--quick" in sys.argv else 4000, 128, 64, 0.5


class Net(torch.nn.Module):
    """Clean signals (B, 1, T) of noisy ones and their noise levels (B,), preconditioned as in EDM."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.first, self.last = torch.nn.Conv1d(2, width, 5, padding=2), torch.nn.Conv1d(width, 1, 5, padding=2)
        self.middle = torch.nn.ModuleList(torch.nn.Conv1d(width, width, 3, 1, 2**i, 2**i) for i in range(6))

    def forward(self, x, sigma):
        s = sigma.float().reshape(-1, 1, 1)
        h = self.first(torch.cat([x / (s**2 + SD**2).sqrt(), (s.log() / 4).expand_as(x)], 1))
        for conv in self.middle:
            h = h + conv(torch.nn.functional.silu(h))
        return SD**2 / (s**2 + SD**2) * x + s * SD / (s**2 + SD**2).sqrt() * self.last(h)


def describe(name, x):
    c = (x - x.mean()).squeeze(1)
    near = (float((c[:, k:] * c[:, :-k]).mean() / c.square().mean()) for k in (1, 8, 32))
    print(f"{name}: std {x.std():.3f}, steps {x.diff().std():.4f}, correlation " + ", ".join(f"{r:.3f}" for r in near))


torch.manual_seed(0)
grey = torch.tensor(load_sample_image("flower.jpg").mean(2), dtype=torch.float32)
data = ((grey - grey.mean()) / grey.std() * SD).unfold(1, LENGTH, 16).reshape(-1, 1, LENGTH)
model = Net()
ema, optimizer = EMA(model, 0.999, warmup=0.05), torch.optim.RAdam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
objective = EasyConsistencyTuning(steps_per_stage=STEPS / 6, P_mean=0.5, P_std=2.0, huber_c=0.3)
for step in range(STEPS):
    optimizer.zero_grad()
    objective(model, data[torch.randint(len(data), (BATCH,))], step=step).loss.mean().backward()
    optimizer.step()
    schedule.step()
    ema.update(model, step + 1)
with torch.no_grad():
    for sigmas in ([80.0], [80.0, 0.8]):
        describe(f"samples, {len(sigmas)} NFE", multistep(ema.module, torch.randn(2000, 1, LENGTH), sigmas))
describe("data", data[torch.randint(len(data), (2000,))])
