"""The build entry; metadata and dependencies are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["engine", "engine.*"]),
    package_data={
        "engine": ["*/presets/*.yaml", "report/*.html", "py.typed", "kernels/*.h", "kernels/*.json", "kernels/*/*.cpp"]
    },
)
