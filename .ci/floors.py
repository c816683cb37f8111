"""Prints the lowest versions that setup.cfg allows, as constraints for pip."""

import re
from configparser import ConfigParser
from pathlib import Path


def floors(setup_cfg: Path, extras: list[str]) -> list[str]:
    """
    Constraints that pin each requirement to the version behind its `>=`.

    Args:
        setup_cfg (`Path`):
            The configuration.
        extras (`list[str]`):
            Whose requirements to pin beside those of the package itself.

    Raises:
        `ValueError`: If a requirement has no such version.
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
        raise ValueError(f"{requirement!r} in setup.cfg is not of the form name>=version or name>=version,<version")
    return f"{match[1]}=={match[2]}"


if __name__ == "__main__":
    print("\n".join(floors(Path(__file__).parents[1] / "setup.cfg", ["math", "quantization"])))
