"""The settings of a run: what there is (schema), how it is read (reading), what goes together (rules), what is said."""

# ruff: noqa: F401, I001 (one module may take several lines)
from config.errors import Arguments, ConfigError, RunFailed, command, exit_code, machine_failure, ours, printable
from config.reading import dump, first_difference, load, parse
from config.schema import CD, CMT, CT, ECT, EDM, ICT, IMF, MLP, PD, SCD, SCT, TCM, DhariwalUNet, SongUNet, TrigFlow
from config.schema import DiT, Flow, MeanFlow, SoFlow
from config.schema import Config, Data, Ema, Metrics, Network, Run, Sample, Section, Train, UNet
from config.schema import in_steps, is_text_setting, json_schema, kinds, path_text
