"""All of the package's metadata. pyproject.toml configures tools only."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/bt_adapter_hf/__init__.py").read_text(), re.MULTILINE)[1]

# decord 0.6.0, its last release, has wheels for these two platforms only and no source archive.
HAS_DECORD_WHEEL = "(sys_platform == 'linux' and platform_machine == 'x86_64') or sys_platform == 'win32'"

CORE = [
    "torch>=2.12",
    "torchvision>=0.27",
    "transformers>=5.23,<6",
    "safetensors>=0.8",
    "huggingface_hub>=1.31,<3",
    "numpy>=2.0",
    "packaging>=24.2",
    "pillow>=10.4",
    "av>=18.1",
    "tqdm>=4.66.3",
    "filelock>=3.13",
    f"decord>=0.6.0; {HAS_DECORD_WHEEL}",
]

EXTRAS = {
    "train": ["accelerate>=1.12", "datasets>=4.0", "matplotlib>=3.9", "peft>=0.20"],
    "eval": ["accelerate>=1.12", "datasets>=4.0", "ftfy>=6.1", "matplotlib>=3.9", "openai>=1.56", "scipy>=1.13"],
    "search": ["lancedb>=0.39"],
    "quickstart": ["lancedb>=0.39", "scikit-learn>=1.5"],
    "quantization": ["bitsandbytes>=0.50"],
    "torchcodec": ["torchcodec>=0.12"],  # a further decoder; needs FFmpeg's libraries
    "demo": ["gradio>=6.20", "lancedb>=0.39"],
    "docs": ["jupytext>=1.17", "mkdocs>=1.6.1", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
    "test": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ray>=2.60",  # its Data, whose pandas and pyarrow come with datasets
        "ruff==0.17.*",
        "evaluate>=0.4.6",
        "open_clip_torch>=2.30",
        "sentence-transformers>=6.2",
        "tensorboard>=2.20",
    ],
}
# The tests cover every part. ruff is pinned to the series whose formatting the code follows.
EXTRAS["test"] += sorted({package for extra in EXTRAS.keys() - {"test"} for package in EXTRAS[extra]})
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})

setup(
    name="bt_adapter_hf",
    version=VERSION,
    description="Give an image-language model video, with a small trained branch and its image ability kept exactly",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["video", "vision-language", "adapter", "retrieval", "transformers", "CLIP"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"bt_adapter_hf": ["py.typed", "assets/**/*"]},
    include_package_data=False,
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["bt-adapter = bt_adapter_hf.cli.main:main"],
        "lmms_eval.models": ["bt_adapter = bt_adapter_hf.evaluation.lmms_eval:manifest"],
    },
)
