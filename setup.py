"""kernels/ at the top level installs as vpt_fast.kernels; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

kernels = ["vpt_fast.kernels", *(f"vpt_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["vpt_fast", "vpt_fast.*"]), *kernels],
    package_dir={"vpt_fast.kernels": "kernels"},
)
