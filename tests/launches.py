"""Runs in this process, where everything is imported, what a command would launch."""

import runpy
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest import mock

from trl.cli import accelerate_launcher
from trl.cli.main import main as trl_main


def launch_of_trl(words: list[str]) -> Namespace:
    """What the stock `trl` command would launch: module or script, and its arguments."""
    launches = []
    launch = partial(accelerate_launcher.launch_training_script, launch_command_fn=launches.append)
    with mock.patch.object(accelerate_launcher, "launch_training_script", launch):
        trl_main(words)
    return launches[0]


def start(launch: Namespace) -> None:
    run = partial(runpy.run_module, alter_sys=True) if launch.module else runpy.run_path
    argv = [launch.training_script, *map(str, launch.training_script_args)]
    path = [str(Path(launch.training_script).parent), *sys.path]
    with mock.patch.multiple(sys, argv=argv, path=path):
        run(launch.training_script, run_name="__main__")
