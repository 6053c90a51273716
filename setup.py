"""Packages, two of which live in top-level folders: integrations/ and benchmarks/ are imported below hf_paged."""

from setuptools import find_packages, setup

OUTSIDE = {"hf_paged.integrations": "integrations", "hf_paged.benchmarks": "benchmarks"}

packages = find_packages(include=["hf_paged", "hf_paged.*", "hf_paged_kernels", "hf_paged_kernels.*"])
for name, folder in OUTSIDE.items():
    packages += [name, *(f"{name}.{child}" for child in find_packages(folder))]

setup(packages=packages, package_dir=OUTSIDE)
