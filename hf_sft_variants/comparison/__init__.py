"""Training several recipes on the same data with the same seeds, evaluating them alike, and comparing them."""

from .plan import plan_runs
from .runs import check_devices, compare_study
from .study import Study, read_study


__all__ = ["Study", "check_devices", "compare_study", "plan_runs", "read_study"]
