"""Lightning callbacks: they read what `training_step` returns and log, write or save; none changes the training."""

from dynamo_lightning.callbacks.benchmark_report import BenchmarkReport
from dynamo_lightning.callbacks.checkpoint import IterationCheckpoint
from dynamo_lightning.callbacks.entropy_spikes import EntropySpikeMonitor
from dynamo_lightning.callbacks.gradient_stability import GradientStabilityMonitor
from dynamo_lightning.callbacks.group_table import GroupTable
from dynamo_lightning.callbacks.key_plots import KeyPlots
from dynamo_lightning.callbacks.learning_signal import LearningSignalMonitor
from dynamo_lightning.callbacks.modulation_histograms import ModulationHistograms
from dynamo_lightning.callbacks.predictions import PredictionWriter
from dynamo_lightning.callbacks.progress_lines import ProgressLines
from dynamo_lightning.callbacks.rollout_table import RolloutTable
from dynamo_lightning.callbacks.run_report import RunReport
from dynamo_lightning.callbacks.throughput import ThroughputMonitor
from dynamo_lightning.callbacks.tripwires import Tripwires
from dynamo_lightning.callbacks.variance_reduction import VarianceReductionMonitor

__all__ = [
    "BenchmarkReport",
    "EntropySpikeMonitor",
    "GradientStabilityMonitor",
    "GroupTable",
    "IterationCheckpoint",
    "KeyPlots",
    "LearningSignalMonitor",
    "ModulationHistograms",
    "PredictionWriter",
    "ProgressLines",
    "RolloutTable",
    "RunReport",
    "ThroughputMonitor",
    "Tripwires",
    "VarianceReductionMonitor",
]
