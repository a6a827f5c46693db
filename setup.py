"""Package metadata.

Release: set `__version__` in hf_dspark/__init__.py, move CHANGELOG's entries under it, `make test`, `make
test-versions`, tag.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "hf_dspark/__init__.py").read_text(encoding="utf-8"))[1]

EXTRAS = {
    "bnb": ["bitsandbytes>=0.48"],
    "kernels": ["triton>=3.6; platform_system == 'Linux'"],
    "eval": ["datasets>=4.0", "matplotlib>=3.8"],
    "train": ["datasets>=4.0"],
    "notebook": ["ipykernel>=6.29", "ipywidgets>=8.1"],
    "demo": ["gguf>=0.17", "rich>=13.7"],
    "ray": ["ray[data]>=2.49"],
}
EXTRAS["dev"] = [
    *EXTRAS["demo"],
    *EXTRAS["bnb"],
    *EXTRAS["kernels"],
    *EXTRAS["ray"],
    "matplotlib>=3.8",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.14",
    "scipy>=1.11",
]
EXTRAS["all"] = sorted({name for names in EXTRAS.values() for name in names})

setup(
    name="hf-dspark",
    version=VERSION,
    description="DSpark speculative decoding inside Hugging Face transformers: generate(..., assistant_model=draft)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["hf_dspark", "hf_dspark.*"]),
    package_data={"hf_dspark": ["py.typed", "weights/**/*"]},
    install_requires=[
        "transformers>=5.18,<6",
        "torch>=2.7",
        "accelerate>=1.1",
        "safetensors>=0.5",
        "huggingface-hub>=1.0",
        "tqdm>=4.60",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-dspark = hf_dspark.cli:main"]},
)
