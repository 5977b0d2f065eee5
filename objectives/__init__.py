"""Training objectives: one file a method, one class each, all called alike.

    out = objective(model, x, step=k, draws=draws, **conditions)    # out.loss: (B,), out.log: name -> scalar
    out.loss.mean().backward()
    objective.after_step(model, step=k)     # only where a method has one (the CT target)
    objective.group_size    # samples that a pass must hold together (CMT's trajectories); without it, 1
    objective.rows_differ   # whether some rows of a batch take fewer passes than others; without it, no
    objective.scheduled     # whether a step depends on the run's length (CT's grid); without it, no

`model(x, sigma, **conditions)` is any module from a batch of any shape and its noise levels (B,) to clean data. Flow
maps (flow, meanflow, soflow, imf) are `model(z, t, r, **conditions)`, the average velocity between two times (B,).
autoencoder's is `model.encode(x)` and `model.decode(z)`, networks.Autoencoder.
"""

from objectives.autoencoder import KLAutoencoder as KLAutoencoder
from objectives.cd import ConsistencyDistillation as ConsistencyDistillation
from objectives.cmt import MidTraining as MidTraining
from objectives.common import Output as Output
from objectives.ct import ConsistencyTraining as ConsistencyTraining
from objectives.ect import EasyConsistencyTuning as EasyConsistencyTuning
from objectives.edm import EDM as EDM
from objectives.flow import FlowMatching as FlowMatching
from objectives.ict import ImprovedConsistencyTraining as ImprovedConsistencyTraining
from objectives.imf import ImprovedMeanFlow as ImprovedMeanFlow
from objectives.meanflow import MeanFlow as MeanFlow
from objectives.pd import ProgressiveDistillation as ProgressiveDistillation
from objectives.scm import ContinuousConsistency as ContinuousConsistency
from objectives.soflow import SoFlow as SoFlow
from objectives.tcm import TruncatedConsistency as TruncatedConsistency
