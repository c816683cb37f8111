"""Prints the lowest versions that setup.cfg allows, as pip constraints."""

import re
from configparser import ConfigParser
from pathlib import Path


def floors(setup_cfg: Path, extras: list[str]) -> list[str]:
    """
    Pin each requirement to the version after its `>=`.

    Args:
        setup_cfg (`Path`):
            Path to `setup.cfg`.
        extras (`list[str]`):
            Extras whose requirements to pin along with those of the package.

    Raises:
        `ValueError`: If a requirement has no lowest version.
    """
    config = ConfigParser()
    config.read(setup_cfg)
    requirements = config["options"]["install_requires"].splitlines()
    for extra in extras:
        requirements += config["options.extras_require"][extra].splitlines()
    return [floor(requirement) for requirement in requirements if requirement]


def floor(requirement: str) -> str:
    match = re.fullmatch(r"([\w-]+)>=([\d.]+)(,<[\d.]+)?", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} in setup.cfg must be name>=version or name>=version,<version.")
    return f"{match[1]}=={match[2]}"


if __name__ == "__main__":
    print("\n".join(floors(Path(__file__).parents[1] / "setup.cfg", ["math", "quantization"])))
